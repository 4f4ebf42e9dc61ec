"""UperNet, arXiv 1807.10221: every pixel of an image classified, on a pyramid (PIIP) or any other backbone."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn import functional as F

from penstock.datamodules.detection_transforms import Resizing, resized
from penstock.lightning_modules.callbacks.ranks import largest, shared_count
from penstock.lightning_modules.class_masks import AT_ONCE, IGNORED, pixel_loss, resized_scores, slid, window_places
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.exporting_classes import Exportable, exportable_segmenter
from penstock.lightning_modules.layer_decay import layer_optimizers
from penstock.lightning_modules.nets.piip.costs import Costs, costs
from penstock.lightning_modules.nets.piip.dense import MergedPyramid
from penstock.lightning_modules.nets.upernet import SegmentationNet
from penstock.lightning_modules.training import keep_converted, log_mean, optimizers
from penstock.lightning_modules.weights.piip import load_released


class UperNet(LightningModule):
    """Trains a network that scores pixels; on a pyramid, biases and other vectors have no weight decay.

    Losses are means over the pixels of all ranks' images that have a class.

    Args:
        net: Gives scores.
        optimizer: Of all that trains.
        scheduler: By steps.
        auxiliary: Weight of the second head's loss.
        layer_decay: Of a pyramid, factor of the learning rate from each layer of the branches to the one before.
        window: Side of windows, pixels, in which images are evaluated; None as a whole.
        stride: From one window to the next, pixels; their scores are averaged where they overlap. None is the window.
        pad_multiple: Images and windows are padded to multiples of it, for a backbone whose grids need that.
        initial: Checkpoint whose raw weights it starts from, or a file of PIIP's authors, see `load_released`; None are
            the backbone's own.

    Attributes:
        classes: Names of the classes of the data it was trained on.
        resizing: How images are resized in evaluation, as pictures of a folder are.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        net: SegmentationNet,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        auxiliary: float = 0.4,
        layer_decay: float = 1.0,
        window: int | None = None,
        stride: int | None = None,
        pad_multiple: int = 32,
        initial: str | None = None,
    ):
        super().__init__()
        if not 0 < layer_decay <= 1:
            raise UserError(f"model.layer_decay: found {layer_decay}, expected above 0 and at most 1")
        self.on_pyramid = isinstance(net.backbone, MergedPyramid)
        if layer_decay != 1 and not self.on_pyramid:
            raise UserError(f"model.layer_decay: found {layer_decay}, expected 1 of {net.backbone.about}, no pyramid")
        for name, value, least in (
            ("auxiliary", auxiliary, 0),
            ("window", window, 32),
            ("pad_multiple", pad_multiple, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"model.{name}: found {value}, expected at least {least}")
        if stride is not None and not 0 < stride <= (window or 0):
            raise UserError(f"model.stride: found {stride}, expected 1 to model.window, {window}")
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.auxiliary, self.layer_decay, self.pad_multiple = auxiliary, layer_decay, pad_multiple
        self.window, self.stride = window, stride or window
        self.initial: str | None = initial or net.backbone.weights
        self.file, self.released = initial, False
        self.classes: list[str] = []
        self.resizing: Resizing | None = None
        self._told_by_data = self._sharded = False

    image_size = None  # of pictures of a folder: any, one in a batch

    def setup(self, stage: str) -> None:
        """Loads `initial` or the backbone, unless a checkpoint brings all.

        Raises:
            UserError: no weights or those of another model, data of other classes, or batches of one image, of which
                the norm behind the pool of a single cell has no statistics.
        """
        if self.initial:
            if self.file:
                self.released = load_released(self.net, self.file, "segmenter")
            else:
                self.net.backbone.load()
            self.initial = None
        self._sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        data, own = self.trainer.datamodule, self.net.num_classes
        if not hasattr(data, "cropping"):  # pictures of a folder
            return
        if data.num_classes != own:
            raise UserError(f"num_classes: found {own}, expected {data.num_classes}, the data's classes")
        if stage == "fit" and data.batch_size == self.trainer.world_size == 1:
            raise UserError("data.batch_size: found 1, expected at least 2: batch norms need more than one image")
        self.classes, self.resizing, self._told_by_data = list(data.class_names), data.resizing, True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sides = self.resizing and (list(self.resizing.sides), self.resizing.longest)
        checkpoint["trained_on"] = {"classes": self.classes, "sides": sides}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What it was trained on; data at hand say more of themselves.

        Raises:
            UserError: data of other classes, or in another order.
        """
        if not (seen := checkpoint.get("trained_on")):
            return
        if not self._told_by_data:
            self.classes = list(seen["classes"])
            self.resizing = seen["sides"] and Resizing(tuple(seen["sides"][0]), seen["sides"][1])
            return
        for k, (found, expected) in enumerate(zip(self.classes, seen["classes"])):
            if found != expected:
                raise UserError(f"data.classes: found '{found}' as class {k}, expected '{expected}', as in the weights")

    def forward(self, image: Tensor) -> Tensor:
        """Scores `(B, K, H, W)` of images `(B, 3, H, W)` in [-1, 1], padded at the right and bottom with 0."""
        height, width = image.shape[2:]
        beside = [-side % self.pad_multiple for side in (width, height)]
        scores = self.net(F.pad(image, (0, beside[0], 0, beside[1])))[0].float()
        return resized_scores(scores, (height + beside[1], width + beside[0]))[..., :height, :width]

    def scores(self, image: Tensor) -> Tensor:
        """`forward`, in windows if there are any."""
        return self(image) if self.window is None else slid(self, image, self.window, self.stride)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        counted = (batch["mask"] != IGNORED).sum()
        share = counted / shared_count(counted)
        scores = self.net(batch["image"])
        losses = {n: share * pixel_loss(s, batch["mask"]) for n, s in zip(("decode", "auxiliary"), scores)}
        loss = losses["decode"] + self.auxiliary * losses.get("auxiliary", 0)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            values = {f"train/{name}_loss": value.detach() for name, value in losses.items()}
            self.log_dict({"train/loss": loss.detach(), **values}, batch_size=len(batch["index"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluated(batch, "val/loss")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self._evaluated(batch, "test/loss")

    def _evaluated(self, batch: dict[str, Any], name: str) -> dict[str, Tensor]:
        """What `predict_step` gives; logs the mean over the images of the loss on their own pixels."""
        losses, found = batch["image"].new_zeros(len(batch["index"])), torch.full_like(batch["mask"], IGNORED)
        for rows, scores in self._originals(batch):
            height, width = scores.shape[2:]
            masks = batch["mask"][rows, :height, :width]
            losses[rows] = torch.stack([pixel_loss(*one) for one in zip(scores.split(1), masks.split(1))])
            found[rows, :height, :width] = scores.argmax(1).to(found.dtype)
        log_mean(self, name, losses)
        return {"index": batch["index"], "mask": found}

    def _originals(self, batch: dict[str, Any]) -> Iterator[tuple[slice, Tensor]]:
        """Rows with their scores at the size of the images as they were; images of one size together.

        Sharded weights come together in every call: a rank with fewer calls than another makes some in vain.
        """
        sizes = torch.cat([batch["size"], batch["original_size"]], 1).tolist()
        same = all(size == sizes[0] for size in sizes)
        groups = [slice(None)] if same else [slice(k, k + 1) for k in range(len(sizes))]
        calls = sum(self._calls(sizes[rows]) for rows in groups)
        in_vain = largest(calls) - calls if self._sharded else 0
        for rows in groups:
            height, width, *original = sizes[rows][0]
            yield rows, resized_scores(self.scores(batch["image"][rows, :, :height, :width]), tuple(original))
        for _ in range(in_vain):
            self(batch["image"][:1, :, : self.pad_multiple, : self.pad_multiple])

    def _calls(self, sizes: list[list[int]]) -> int:
        """Calls of the network for images of one size."""
        if self.window is None:
            return 1
        return -(-len(sizes) * len(window_places(sizes[0][:2], self.window, self.stride)) // AT_ONCE)

    def on_validation_end(self) -> None:
        """`validate` of the authors' weights leaves the model in `checkpoints/converted.ckpt`."""
        if self.released:
            keep_converted(self)

    def on_predict_start(self) -> None:
        """Refuses predictions that nobody could name.

        Raises:
            UserError: the classes were told neither by data nor by a checkpoint.
        """
        if not self.classes:
            raise UserError("model: its classes are not known; expected ckpt_path=FILE of a trained model")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`index` `(B,)` and `mask` uint8 `(B, H, W)`, classes, of the size of the images as they were, see `mask` of
        `SegmentedData`. A batch without `size` is of pictures as they are.
        """
        batch = batch if "size" in batch else self._resized(batch)
        height, width = batch["original_size"].amax(0).tolist()
        found = batch["image"].new_full((len(batch["index"]), height, width), IGNORED, dtype=torch.uint8)
        for rows, scores in self._originals(batch):
            found[rows, : scores.shape[2], : scores.shape[3]] = scores.argmax(1).to(found.dtype)
        return {"index": batch["index"], "mask": found}

    def _resized(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as data for segmentation would give it."""
        image = batch["image"]
        size = self.resizing.size(*image.shape[2:])
        pixels = ((image + 1) * 127.5).round().to(torch.uint8)
        small = torch.stack([resized(one, size) for one in pixels]).to(image.dtype) / 127.5 - 1
        sizes = torch.tensor(size, device=image.device).expand(len(image), 2)
        return {**batch, "image": small, "size": sizes}

    def exportable(self, image_size: tuple[int, int] | None = None) -> Exportable:
        """What `penstock export` writes, see `exportable_segmenter`."""
        own = self.classes, self.resizing, self.pad_multiple, self.window, self.stride
        return exportable_segmenter(self.net, *own, image_size)

    def costs(self) -> Costs:
        """What `penstock flops` prints; of a model on the meta device.

        Raises:
            UserError: no pyramid.
        """
        if not self.on_pyramid:
            raise UserError(f"flops: counts pyramids by their parts, found {self.net.backbone.about}")
        return costs(self.net, place="backbone")

    def configure_optimizers(self) -> Any:
        if not self.on_pyramid:
            return optimizers(self)
        return layer_optimizers(self, "net.backbone.pyramid", self.layer_decay, decay_vectors=False)
