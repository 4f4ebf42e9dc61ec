"""Bits per dimension of a density model on held-out images or videos."""

import lightning.pytorch as pl
import torch

from penstock.lightning_modules.callbacks.density import bits_per_dim, check_density, evaluated, held_out
from penstock.lightning_modules.callbacks.generation import EvaluationCallback
from penstock.lightning_modules.callbacks.reference import Split
from penstock.lightning_modules.errors import UserError


class BitsPerDim(EvaluationCallback):
    """Logs `bits_per_dim`: mean of `-log2 p(x) / D` in the units of the grey levels, by `log_prob` of the module.

    Images are dequantised uniformly with fixed noise, `x = 2 (level + u) / levels - 1`, so that the density of x bounds
    the probability of the levels (arXiv 1511.01844 section 3.1); the scale adds `log2(levels / 2)`. It only means
    something for a model trained on dequantised images (`data.dequantise=true`).

    Args:
        n: Images or videos, the first ones of the split.
        split: Split they come from.
        every_n_validations: 0 = only after training, in `validate` and `test`.

    Raises:
        UserError: a module without `log_prob`, or data without grey levels.
    """

    def __init__(self, n: int = 256, split: Split = "test", every_n_validations: int = 0):
        super().__init__(every_n_validations)
        if n < 1:
            raise UserError(f"n: {n} images given, expected at least 1")
        self.n, self.split = n, split

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_density(trainer, pl_module, "bits_per_dim")

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each rank scores its share of the samples."""
        total = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        for held in held_out(trainer, pl_module, self.split, self.n):
            generator = torch.Generator(pl_module.device).manual_seed(0)
            log_prob = evaluated(pl_module.log_prob, held.x, held.cond, generator=generator)
            bits = bits_per_dim(log_prob, held.x[0].numel(), trainer.datamodule.levels)
            total += torch.stack([bits.sum(), bits.new_tensor(len(bits))])
        total = trainer.strategy.reduce(total, reduce_op="sum")
        pl_module.log("bits_per_dim", (total[0] / total[1]).float(), batch_size=1, sync_dist=True)
