"""The likelihood of every sample, in a table on disk."""

import csv
from io import StringIO
from pathlib import Path

import lightning.pytorch as pl
import torch

from penstock.lightning_modules.callbacks.density import bits_per_dim, check_density, first_batches, log_prob_of_parts
from penstock.lightning_modules.callbacks.generation import EvaluationCallback
from penstock.lightning_modules.callbacks.ranks import gather_rows
from penstock.lightning_modules.callbacks.reference import Split, data_of
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.loggers import write_atomically


class LikelihoodScores(EvaluationCallback):
    """Writes `likelihood.csv` in the run folder: `index`, `log_prob` in nats and `bits_per_dim` of held-out samples.

    For clips whose module tells frames apart, `frame_<k>` are the bits per dimension of each given those before it.
    Suspects are scored where they are the data: `penstock test ckpt_path=... data.data_dir=SUSPECTS`.

    Args:
        n: Samples, the first ones of the split.
        split: Split they come from.
        every_n_validations: 0 = only after training, in `validate` and `test`.

    Raises:
        UserError: a module without `log_prob`, or data without grey levels.
    """

    def __init__(self, n: int = 1000, split: Split = "test", every_n_validations: int = 0):
        super().__init__(every_n_validations)
        if n < 1:
            raise UserError(f"n: {n} samples given, expected at least 1")
        self.n, self.split = n, split

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_density(trainer, pl_module, "likelihood.csv")

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All ranks score their shares; rank 0 writes."""
        levels, parts = trainer.datamodule.levels, []
        for batch in first_batches(trainer, trainer.datamodule, self.split, self.n):
            log_prob = log_prob_of_parts(pl_module, batch, levels)
            bits = bits_per_dim(log_prob, data_of(batch)[0].numel() // log_prob.shape[1], levels)
            parts.append((batch["index"], log_prob.double().sum(1), bits))
        own = tuple(torch.cat(column) for column in zip(*parts)) or (torch.empty(0, dtype=torch.int64), None, None)
        rows = gather_rows(*own)
        if rows is None:
            return
        index, total, bits = rows
        frames = bits.shape[1] if bits.shape[1] > 1 else 0
        columns = ["index", "log_prob", "bits_per_dim", *(f"frame_{k}" for k in range(frames))]
        lines = zip(index.tolist(), total.tolist(), bits.mean(1).tolist(), bits[:, :frames].tolist())
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *([*line[:3], *line[3]] for line in lines)])
        write_atomically(Path(trainer.default_root_dir, "likelihood.csv"), text.getvalue())
