"""SEPC, arXiv 2005.03101: detectors with a pyramid convolution neck, and the same detectors without it."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from penstock.datamodules.detection_transforms import Resizing, padded, resized
from penstock.lightning_modules.callbacks.ranks import sum_over_ranks
from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.detection.pasting import pasted
from penstock.lightning_modules.detection.selection import Found
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.exporting_detector import exportable_detector
from penstock.lightning_modules.nets.detector import BoxNetwork
from penstock.lightning_modules.nets.pyramid_conv import PyramidConv
from penstock.lightning_modules.training import keep_converted, optimizers


class Sepc(LightningModule):
    """Trains a detector: one-stage with a neck and a host, or two-stage with pyramid convolutions.

    Losses are divided by the number of all ranks' positives, and (integrated) batch norms take the statistics of all
    ranks' images (`SyncNorms`), so that training on several ranks is that on one; in the official code both are of a
    rank's own images.

    Args:
        net: Gives `losses` and `detections`.
        optimizer: Of all that trains.
        scheduler: By steps.

    Attributes:
        classes: Name and id of every class of the data it was trained on.
        resizing: How these were resized, as pictures of a folder are.
        released: Whether the weights are another program's.
        pad_multiple: What each of them is padded to a multiple of, before it is padded to the size of its batch; no
            anchor lies in the latter.
    """

    def __init__(self, net: BoxNetwork, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None = None):
        super().__init__()
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.initial: str | None = net.backbone.weights
        self.classes: list[tuple[str, int]] = []
        self.resizing: Resizing | None = None
        self.pad_multiple, self._told_by_data = 1, False
        self.released = net.origin is not None
        if origin := net.origin:
            self.classes, self.pad_multiple = origin.classes, origin.pad_multiple
            self.resizing = Resizing((origin.side,), origin.longest)

    image_size = None  # of pictures of a folder: any, one in a batch

    def setup(self, stage: str) -> None:
        """Loads the backbone, unless a checkpoint brings it.

        Raises:
            UserError: no weights, or data of other classes.
        """
        if self.initial:
            self.net.backbone.load()
            self.initial = None
        data, own = self.trainer.datamodule, self.net.num_classes
        if not hasattr(data, "category_ids"):  # pictures of a folder
            return
        if data.num_classes != own:
            raise UserError(f"num_classes: found {own}, expected {data.num_classes}, the data's classes")
        if self.net.origin and self.net.origin.named:
            _check_names(data.class_names, self.net.origin.classes)
        self.classes = list(zip(data.class_names, data.category_ids))
        self.resizing, self.pad_multiple, self._told_by_data = data.resizing, data.pad_multiple, True

    def on_fit_start(self) -> None:
        """Warns of statistics of a single image."""
        if self.trainer.datamodule.batch_size == 1 and any(
            isinstance(m, PyramidConv) and m.bn is not None for m in self.net.modules()
        ):
            rank_zero_warn(
                "data.batch_size: found 1; integrated batch norm then has its statistics of a single image, and those "
                "that it keeps for evaluation are noisy; expected about four images, data.batch_size=4, or a neck "
                "without it (neck=pconv, neck=towers)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sides = self.resizing and (list(self.resizing.sides), self.resizing.longest)
        checkpoint["trained_on"] = {"classes": self.classes, "sides": sides, "pad_multiple": self.pad_multiple}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What it was trained on; data at hand say more of themselves.

        Raises:
            UserError: data of other classes, or in another order.
        """
        if not (seen := checkpoint.get("trained_on")):
            return
        if self._told_by_data:
            _check_names([name for name, _ in self.classes], seen["classes"])
        else:
            self.classes, self.pad_multiple = [tuple(row) for row in seen["classes"]], seen["pad_multiple"]
            self.resizing = seen["sides"] and Resizing(tuple(seen["sides"][0]), seen["sides"][1])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        loss = sum(losses.values())
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            values = {f"train/{name}_loss": value.detach() for name, value in losses.items()}
            self.log_dict({"train/loss": loss.detach(), **values}, batch_size=len(batch["index"]))
        return loss

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of a batch with `image`, `size`, `boxes` and `label`."""
        return self.net.losses(batch["image"], *self._targets(batch))

    def _targets(self, batch: dict[str, Any]) -> tuple[list[Objects], list[list[int]]]:
        """Objects of the images, and the images' sizes with their own padding."""
        multiple = self.pad_multiple
        columns = [batch[name] for name in ("boxes", "label", "masks") if name in batch]
        objects = [Objects(*one) for one in zip(*columns)]
        return objects, (-(-batch["size"] // multiple) * multiple).tolist()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What `predict_step` gives; in a fit also logs losses of the same pass, the mean of batches by their images.

        Two-stage detectors and torchvision's have no losses in evaluation mode.
        """
        if self.trainer.state.fn != TrainerFn.FITTING:
            return self.predict_step(batch, batch_idx)
        losses, found = self.net.evaluated(batch["image"], *self._targets(batch), *_sizes(batch))
        if losses:
            values = {"loss": sum(losses.values()), **{f"{name}_loss": value for name, value in losses.items()}}
            images = int(sum_over_ranks(torch.tensor(len(found), device=self.device)))
            for name, value in values.items():
                self.log(f"val/{name}", value, batch_size=images, on_epoch=True, sync_dist=True)
        return _columns(batch, found)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What `predict_step` gives."""
        return self.predict_step(batch, batch_idx)

    def on_validation_end(self) -> None:
        """`validate` of weights of another program leaves the model in `checkpoints/converted.ckpt`."""
        if self.released:
            keep_converted(self)

    def on_predict_start(self) -> None:
        """Refuses predictions that nobody could name.

        Raises:
            UserError: the classes were told neither by data nor by a checkpoint.
        """
        if not self.classes:
            raise UserError("model: its classes are not known; expected ckpt_path=FILE of a trained detector")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`index` `(B,)` and lists of `boxes` `(n, 4)` in original pixels, `scores` and `labels` `(n,)`; of detectors
        that segment also `masks`, lists of n run lengths.

        A batch without `size` is of pictures as they are.
        """
        batch = batch if "size" in batch else self._resized(batch)
        return _columns(batch, self.net.detections(batch["image"], *_sizes(batch)))

    def _resized(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the data for detectors would give it."""
        image = batch["image"]
        original = tuple(image.shape[-2:])
        size = original if self.resizing is None else self.resizing.size(*original)
        pixels = ((image + 1) * 127.5).round().to(torch.uint8)
        small = torch.stack([resized(one, size) for one in pixels]).to(image.dtype) / 127.5 - 1
        sizes = torch.tensor([size, original]).unsqueeze(1).expand(-1, len(image), -1)
        found = {"image": padded(list(small), self.pad_multiple), "size": sizes[0]}
        return {**batch, **found, "original_size": batch.get("original_size", sizes[1]).cpu()}

    def exportable(
        self, image_size: tuple[int, int] | None = None
    ) -> tuple[nn.Module, dict[str, Tensor], list[str], dict[str, Any]]:
        """What `penstock export` writes, see `exportable_detector`."""
        return exportable_detector(self.net, self.classes, self.resizing, self.pad_multiple, image_size)

    def configure_optimizers(self) -> Any:
        return optimizers(self)


def _check_names(found: Sequence[str], trained: Sequence[tuple[str, int]]) -> None:
    """Refuses data whose classes are not those of the weights, one by one; `_` and a space are the same.

    Raises:
        UserError: the first that differs.
    """
    for k, (name, (expected, _)) in enumerate(zip(found, trained)):
        if name.replace("_", " ") != expected.replace("_", " "):
            raise UserError(f"data.classes: found '{name}' as class {k}, expected '{expected}', as in the weights")


def _sizes(batch: dict[str, Any]) -> tuple[list[list[int]], Tensor]:
    """Height and width of the images without padding, and what makes boxes in their pixels those of the originals."""
    size = batch["size"].to(torch.float32)
    scales = (size / batch["original_size"]).flip(1).repeat(1, 2)
    return batch["size"].tolist(), scales.to(batch["image"].device, non_blocking=True)


def _columns(batch: dict[str, Any], found: list[Found]) -> dict[str, Any]:
    """What steps return."""
    columns = {name: [getattr(one, name) for one in found] for name in ("boxes", "scores", "labels")}
    if found and found[0].masks is not None:
        sizes = batch["original_size"].tolist()
        columns["masks"] = [pasted(one.masks, one.boxes, size) for one, size in zip(found, sizes)]
    return {"index": batch["index"], **columns}
