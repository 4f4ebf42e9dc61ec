"""PIIP, arXiv 2406.04330 and 2501.07783: images classified by a pyramid, the largest model on the smallest image."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.exporting_classes import Exportable, exportable_classifier
from penstock.lightning_modules.layer_decay import layer_optimizers
from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.costs import Costs, costs
from penstock.lightning_modules.training import keep_converted, log_mean
from penstock.lightning_modules.weights.piip import load_released


class Piip(LightningModule):
    """Trains a classifier on soft targets.

    Args:
        net: Images to logits.
        optimizer: Of all that trains.
        scheduler: By steps.
        mixup: Shape of the Beta law of mixed images (arXiv 1710.09412), 0 without.
        cutmix: Likewise of cut ones (arXiv 1905.04899); with both, a coin is tossed for each batch.
        smoothing: Of the targets, in [0, 1).
        outside_lr: Factor of the learning rate of all but the branches.
        layer_decay: Factor of the learning rate from each layer of the branches to the one before.
        mean: Of RGB values in [0, 1], what images are normalised by.
        std: Likewise.
        initial: Checkpoint whose raw weights it starts from, or the authors' file, see `load_released`; None are the
            branches' own.

    Attributes:
        classes: Names of the classes of the data it was trained on.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        net: PiipClassifier,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        outside_lr: float = 1.0,
        layer_decay: float = 1.0,
        mean: tuple[float, ...] = (0.5,),
        std: tuple[float, ...] = (0.5,),
        initial: str | None = None,
    ):
        super().__init__()
        for name, value, above in (("mixup", mixup, None), ("cutmix", cutmix, None), ("smoothing", smoothing, 1)):
            if value < 0 or (above is not None and value >= above):
                raise UserError(f"model.{name}: found {value}, expected at least 0{' and below 1' if above else ''}")
        self.net, self.optimizer, self.scheduler, self.smoothing = net, optimizer, scheduler, smoothing
        self.outside_lr, self.layer_decay = outside_lr, layer_decay
        kinds = {v2.MixUp: mixup, v2.CutMix: cutmix}
        with torch.device("cpu"):  # their laws, also where the weights are on the meta device
            mixers = [kind(alpha=alpha, num_classes=net.num_classes) for kind, alpha in kinds.items() if alpha]
        self.mixing = v2.RandomChoice(mixers) if mixers else None
        self.classes: list[str] = []
        self.initial: str | None = initial or ", ".join(branch.weights for branch in net.pyramid.branches)
        self.file, self.released = initial, False
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    def setup(self, stage: str) -> None:
        """Loads weights, unless a checkpoint brings all.

        Raises:
            UserError: no weights or those of another model, or data of other classes or another size.
        """
        if self.initial:
            self._start()
            self.initial = None
        data, (side, _) = self.trainer.datamodule, self.image_size
        if tuple(data.shape[1:]) != (side, side):
            found = "x".join(map(str, data.shape[1:]))
            raise UserError(f"image_size: found images of {found} pixels, expected {side}x{side}, the pyramid's")
        if stage == "predict":
            return
        if data.num_classes != self.net.num_classes:
            found, expected = self.net.num_classes, data.num_classes
            raise UserError(f"num_classes: found {found}, expected {expected}, the data's classes")
        self.classes = list(data.class_names)

    def _start(self) -> None:
        if not self.file:
            self.net.load()
            return
        self.released = load_released(self.net, self.file, "classifier")
        if self.released and self.net.merged is None and self.net.token != "first_patch":
            rank_zero_warn(
                f"model.net.token: found {self.net.token}, but the authors' classifiers read the upper left patch; "
                "expected model.net.token=first_patch, unless they are trained on"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """What pictures of a folder are resized to."""
        side = self.net.pyramid.size
        return side, side

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.classes = checkpoint.get("classes", [])

    def forward(self, image: Tensor) -> Tensor:
        """Logits `(B, K)` of images `(B, C, H, W)` in [-1, 1]."""
        return self.net(((image + 1) / 2 - self.mean) / self.std)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        image, target = batch["image"], batch["label"]
        if self.mixing is not None:
            image, target = self.mixing(image, target)
        loss = F.cross_entropy(self(image), target, label_smoothing=self.smoothing)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.detach(), batch_size=len(batch["index"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, "val/", "val/")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, "test/", "")

    def _score(self, batch: dict[str, Any], split: str, prefix: str) -> None:
        """Logs the split's loss, `accuracy` and, of more than five classes, `accuracy_top5`, means over the images."""
        logits, labels = self(batch["image"]).float(), batch["label"]
        values = {f"{split}loss": F.cross_entropy(logits, labels, reduction="none")}
        for name, k in (("accuracy", 1), ("accuracy_top5", 5)):
            if k < self.net.num_classes:
                values[prefix + name] = (logits.topk(k).indices == labels[:, None]).any(1).float()
        for name, value in values.items():
            log_mean(self, name, value)

    def on_validation_end(self) -> None:
        """`validate` of the authors' weights leaves the model in `checkpoints/converted.ckpt`."""
        if self.released:
            keep_converted(self)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`index` `(B,)` and `probabilities` `(B, K)`."""
        return {"index": batch["index"], "probabilities": self(batch["image"]).float().softmax(1)}

    def costs(self) -> Costs:
        """What `penstock flops` prints; of a model on the meta device."""
        return costs(self.net, self._channels)

    def exportable(self) -> Exportable:
        """What `penstock export` writes, see `exportable_classifier`."""
        shape = (self._channels, *self.image_size)
        return exportable_classifier(self.net, self.mean, self.std, self.classes, shape)

    @property
    def _channels(self) -> int:
        return self.net.pyramid.branches[-1].patch_embed.in_channels

    def configure_optimizers(self) -> Any:
        """The optimiser, with its scheduler by steps, of groups of learning rates where these differ."""
        return layer_optimizers(self, "net.pyramid", self.layer_decay, self.outside_lr)
