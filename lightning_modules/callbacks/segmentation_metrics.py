"""Intersection over union and accuracy of classified pixels."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from penstock.lightning_modules.callbacks.best_epoch import BestEpoch
from penstock.lightning_modules.callbacks.ranks import sum_over_ranks
from penstock.lightning_modules.class_masks import IGNORED
from penstock.lightning_modules.errors import UserError

Monitor = Literal["miou", "mean_accuracy", "pixel_accuracy"]


class SegmentationMetrics(pl.Callback):
    """Scores what `validation_step` and `test_step` return: the `mask` `(B, H, W)` of classes, against the batch's.

    Pixels of all images and ranks are counted in one table of classes; those that the batch's mask ignores are not.
    Logs `miou`, `mean_accuracy`, `pixel_accuracy` and `iou_of/<class>`, see `scores_of`: as `val/<name>` in a fit and
    by `validate`, under these names by `test`.

    A fit also logs those without a slash of its best epoch so far, and `epoch`, as `best_on_val/<name>`, or
    `best_on_test/<name>` where the validation images are the test images; the best is kept in the checkpoint.

    Args:
        monitor: Metric whose largest value makes the best epoch; of equal ones the first.
        save_best: Whether the best epoch is kept as `checkpoints/best.ckpt`.

    Raises:
        UserError: data without masks of classes, or outputs that are not as above.
    """

    def __init__(self, monitor: Monitor = "miou", save_best: bool = True) -> None:
        self.best = BestEpoch(monitor, save_best)
        self._counts: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.best.clear()
        if stage != "predict" and not hasattr(trainer.datamodule, "cropping"):
            name = type(trainer.datamodule).__name__
            raise UserError(f"SegmentationMetrics: {name} has no masks of classes, expected data such as digit_masks")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        classes = trainer.datamodule.num_classes
        self._counts = torch.zeros(classes, classes, dtype=torch.int64, device=pl_module.device)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: dict[str, Any], *_: int
    ) -> None:
        if not isinstance(outputs, dict) or "mask" not in outputs:
            found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise UserError(f"outputs of a step: {found} found, expected mask")
        self._counts += confusion(outputs["mask"], batch["mask"], len(self._counts))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module, "val/")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module, "")

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
        values = scores_of(sum_over_ranks(self._counts).cpu(), trainer.datamodule.class_names)
        logged = {f"{prefix}{name}": value for name, value in values.items()}
        if trainer.state.fn == TrainerFn.FITTING:
            logged |= self.best.see(trainer, {name: value for name, value in values.items() if "/" not in name})
        pl_module.log_dict(logged, batch_size=1, sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.best.keep(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the best epoch so far."""
        return {"best": self.best.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best.values = dict(state_dict["best"])


def confusion(found: Tensor, truth: Tensor, classes: int) -> Tensor:
    """int64 `(K, K)`: how many pixels of a class (row) were found to be of another (column).

    Args:
        found: `(...)`, classes.
        truth: `(...)`, classes, or `IGNORED` for pixels that do not count.
        classes: K.
    """
    counted = truth != IGNORED
    return multiclass_confusion_matrix(found[counted].long(), truth[counted].long(), classes, validate_args=False)


def scores_of(counts: Tensor, class_names: Sequence[str]) -> dict[str, float]:
    """Metrics of a table of pixels, in [0, 1], that it defines.

    `iou_of/<class>` is the pixels that are of a class and were found to be over those that are or were; `miou` the mean
    over the classes that are or were. `mean_accuracy` is the mean over the classes that are of the share found, and
    `pixel_accuracy` the share of all pixels.

    Args:
        counts: See `confusion`.
        class_names: Of its rows and columns.
    """
    counts = counts.double()
    hits, are, were = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = hits / (are + were - hits), hits / are
    values = {"miou": iou.nanmean(), "mean_accuracy": accuracy.nanmean(), "pixel_accuracy": hits.sum() / are.sum()}
    values |= {f"iou_of/{name}": value for name, value in zip(class_names, iou)}
    return {name: float(value) for name, value in values.items() if not value.isnan()}
