"""How likely the frames of held-out clips are, one after the other."""

import csv
from io import StringIO
from pathlib import Path

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from PIL import Image

from penstock.lightning_modules.callbacks.density import bits_per_dim, check_density, evaluated, held_out
from penstock.lightning_modules.callbacks.generation import EvaluationCallback
from penstock.lightning_modules.callbacks.pictures import keep_picture, rendered
from penstock.lightning_modules.callbacks.ranks import rank_and_world
from penstock.lightning_modules.callbacks.reference import Split
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.loggers import write_atomically

NAME = "likelihood_per_frame"
COLUMNS = ["frame", "bits_per_dim", "standard_error"]


class LikelihoodCurve(EvaluationCallback):
    """Mean of `-log2 p(frame n | frames < n) / D` over held-out clips, frame by frame, dequantised as in `BitsPerDim`.

    Leaves the curve as `samples/likelihood_per_frame.png` and `.csv` (with the standard error of the mean), sends it to
    loggers as picture and table, and logs `bits_per_dim_first_frame` and `bits_per_dim_later_frames`: what a frame
    costs without and with others before it. Equal frames make their mean `bits_per_dim`.

    Args:
        n: Clips, the first ones of the split.
        split: Split they come from.
        every_n_validations: 0 = only after training, in `validate` and `test`.

    Raises:
        UserError: a module without `frame_log_prob`, or data that are no videos of two frames or more.
    """

    def __init__(self, n: int = 256, split: Split = "test", every_n_validations: int = 0):
        super().__init__(every_n_validations)
        if n < 2:
            raise UserError(f"n: {n} clips given, expected at least 2")
        self.n, self.split = n, split

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_density(trainer, pl_module, NAME, "frame_log_prob")
        shape = tuple(trainer.datamodule.shape)
        if len(shape) != 4 or shape[0] < 2:
            raise UserError(f"{NAME}: data of shape {shape}, expected videos of 2 frames or more")

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each rank scores its share of the clips."""
        total = torch.zeros(3, trainer.datamodule.shape[0], dtype=torch.float64, device=pl_module.device)
        for held in held_out(trainer, pl_module, self.split, self.n):
            log_prob = evaluated(pl_module.frame_log_prob, held.x, held.cond)
            bits = bits_per_dim(log_prob, held.x[0, 0].numel(), trainer.datamodule.levels)
            total += torch.stack([torch.ones_like(bits).sum(0), bits.sum(0), bits.square().sum(0)])
        count, bits, squares = trainer.strategy.reduce(total, reduce_op="sum").cpu()
        mean = bits / count
        error = ((squares / count - mean.square()).clamp(min=0) / (count - 1)).sqrt()
        values = {"bits_per_dim_first_frame": mean[0], "bits_per_dim_later_frames": mean[1:].mean()}
        pl_module.log_dict({name: value.float() for name, value in values.items()}, batch_size=1, sync_dist=True)
        if rank_and_world()[0] == 0:
            _keep(trainer, mean.tolist(), error.tolist())


def _keep(trainer: pl.Trainer, mean: list[float], error: list[float]) -> None:
    rows = [[n, m, e] for n, (m, e) in enumerate(zip(mean, error))]
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_atomically(Path(trainer.default_root_dir, "samples", f"{NAME}.csv"), text.getvalue())
    keep_picture(trainer, _drawn(mean, error), NAME, NAME)
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(NAME, columns=COLUMNS, data=rows, step=trainer.global_step)


def _drawn(mean: list[float], error: list[float]) -> Image.Image:
    figure = Figure(figsize=(6, 4), dpi=100)
    axes = figure.add_subplot()
    axes.errorbar(range(len(mean)), mean, yerr=[2 * e for e in error], marker="o", markersize=4, capsize=2)
    axes.set(xlabel="frame", ylabel="bits per dimension, given the frames before")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    return rendered(figure)
