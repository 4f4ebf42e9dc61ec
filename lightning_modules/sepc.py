"""SEPC, arXiv 2005.03101: detectors with a pyramid convolution neck, and the same detectors without it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import Detector
from penstock.lightning_modules.nets.two_stage import TwoStageDetector
from penstock.lightning_modules.training import optimizers


class Sepc(LightningModule):
    """Trains a detector: one-stage with a neck and a host, or two-stage with pyramid convolutions.

    Args:
        net: Gives `losses` and `detections`.
        optimizer: Of all that trains.
        scheduler: By steps.
        pad_multiple: Each image is padded to a multiple of it before it is padded to the size of its batch; no anchor
            lies in the latter.
    """

    def __init__(
        self,
        net: Detector | TwoStageDetector,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        pad_multiple: int = 32,
    ):
        super().__init__()
        self.net, self.optimizer, self.scheduler, self.pad_multiple = net, optimizer, scheduler, pad_multiple
        self.initial: str | None = net.backbone.weights

    def setup(self, stage: str) -> None:
        """Loads the backbone, unless a checkpoint brings it.

        Raises:
            UserError: no weights, or data of other classes.
        """
        if self.initial:
            self.net.backbone.load()
            self.initial = None
        classes, own = getattr(self.trainer.datamodule, "num_classes", None), self.net.num_classes
        if stage == "fit" and classes is not None and classes != own:
            raise UserError(f"num_classes: found {own}, expected {classes}, the data's classes")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        loss = sum(losses.values())
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            values = {f"train/{name}_loss": value.detach() for name, value in losses.items()}
            self.log_dict({"train/loss": loss.detach(), **values}, batch_size=len(batch["index"]))
        return loss

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch with `image`, `size`, `boxes` and `label`."""
        multiple = self.pad_multiple
        padded = (-(-batch["size"] // multiple) * multiple).tolist()
        objects = [Objects(boxes, labels) for boxes, labels in zip(batch["boxes"], batch["label"])]
        return self.net.losses(batch["image"], objects, padded)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What `predict_step` gives."""
        return self.predict_step(batch, batch_idx)

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`index` `(B,)` and lists of `boxes` `(n, 4)` in original pixels, `scores` and `labels` `(n,)`."""
        size = batch["size"].to(torch.float32)
        scales = (size / batch["original_size"]).flip(1).repeat(1, 2)
        found = self.net.detections(batch["image"], batch["size"].tolist(), scales)
        columns = ("boxes", "scores", "labels")
        return {"index": batch["index"], **{name: [getattr(one, name) for one in found] for name in columns}}

    def configure_optimizers(self) -> Any:
        return optimizers(self)
