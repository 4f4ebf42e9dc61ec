"""FastFlow (arXiv 2111.07677): anomalies are where features of an image are unlikely under a normalizing flow."""

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from penstock.lightning_modules.calibration import Calibration
from penstock.lightning_modules.callbacks.ranks import sum_over_ranks
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.feature_cache import FeatureCache
from penstock.lightning_modules.flow.anomaly_map import anomaly_map, blurred, image_score, map_of_means
from penstock.lightning_modules.flow.tiles import tiled
from penstock.lightning_modules.nets.fastflow import (
    ChannelNorm,
    Coded,
    FastFlowNet,
    moments_of,
    negative_log_likelihood,
)
from penstock.lightning_modules.nets.folded_flow import FoldedFlow
from penstock.lightning_modules.training import optimizers


class FastFlow(LightningModule):
    """Trains flows on the feature maps of normal images by their exact likelihood.

    Loss: `mean_b sum_l 1/2 |z_l|^2 - logdet_l`, a sum over all elements of the maps, about 1e5 an image; learning rates
    are meant for that.

    Args:
        net: Frozen network and flows.
        optimizer: Makes the optimiser from what trains.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        top: Share of a map's largest values whose mean is the image's score, in [0, 1]; 0 takes the largest value.
        blur: Standard deviation in pixels of a Gaussian that maps are smoothed with; 0 is none.
        tile: Side or (height, width) of what the network sees at once; larger images are scored in overlapping tiles.
            None is none.
        overlap: Least share of a tile that its neighbour sees too, in [0, 1).
        cache_features: Whether feature maps are made once, before the first epoch, and kept in memory, all of them on
            every rank. Only for data without augmentation, whose images are the same in every epoch.

    Attributes:
        calibration: Thresholds and ranges of scores; the metrics set them on validation images.
        initial: Weights of the frozen network that are loaded at first; None once they are, or a checkpoint has them.

    Raises:
        UserError: a share or a width out of range.
    """

    def __init__(
        self,
        net: FastFlowNet,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        top: float = 0.0,
        blur: float = 0.0,
        tile: int | tuple[int, int] | None = None,
        overlap: float = 0.25,
        cache_features: bool = False,
    ):
        super().__init__()
        if not 0 <= top <= 1:
            raise UserError(f"model.top: found {top}, expected a share in [0, 1]")
        if not 0 <= blur < float("inf"):
            raise UserError(f"model.blur: found {blur}, expected 0 or more pixels")
        if not 0 <= overlap < 1:
            raise UserError(f"model.overlap: found {overlap}, expected a share in [0, 1)")
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.initial: str | None = net.backbone.weights
        self.top, self.blur, self.overlap = top, blur, overlap
        self.tile = (tile, tile) if isinstance(tile, int) else tile
        self.calibration = Calibration(
            {
                "model.net.image_size": self.net.image_size,
                "model.top": [top],
                "model.blur": [blur],
                "model.tile": self.tile or (0, 0),
                "model.overlap": [overlap if self.tile else 0],
            }
        )
        self.cache, self.known = FeatureCache() if cache_features else None, False

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of images to predict on; None is any, seen in tiles."""
        return self.net.image_size if self.tile is None else None

    def setup(self, stage: str) -> None:
        """Loads the frozen network, unless a checkpoint brings it.

        Raises:
            UserError: no weights, or features to be kept of augmented images or of a sharded network.
        """
        if self.initial:
            self.net.backbone.load()
            self.initial = None
        if self.cache is None:
            return
        if getattr(self.trainer.datamodule, "augments", False):
            raise UserError(
                "model.cache_features: found true with augmented images (data.flip, data.rotate); expected one of them"
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy):  # ranks would wait for those that find theirs kept
            raise UserError("model.cache_features: found true with strategy=fsdp; expected false, or strategy=ddp")

    def maps_of(self, batch: dict[str, Any]) -> list[Tensor]:
        """Feature maps of a batch, in a fit from the cache where there is one."""
        if self.cache is None or self.trainer.state.fn != TrainerFn.FITTING:
            return self.net.maps(batch["image"])
        return self.cache(batch["index"], batch["image"], self.net.maps, self.trainer.training and self.known)

    def on_fit_start(self) -> None:
        """Keeps the feature maps of the training images where they are to be kept, and measures them where norms of
        channels are new.

        The images come in batches that a run and the same run resumed have in common, for features of another batch
        differ in their last bits; ranks share them where nothing is kept.
        """
        norms = [norm for norm in self.net.norms if isinstance(norm, ChannelNorm)]
        norms, kept = [norm for norm in norms if not int(norm.count)], self.cache is not None
        if not (norms or kept):
            return
        data = self.trainer.datamodule
        moments = [torch.zeros(3, norm.mean.numel(), dtype=torch.float64, device=self.device) for norm in norms]
        for batch in data.reference_dataloader("train", everywhere=kept):
            batch = data.transfer_batch_to_device(batch, self.device, 0)
            for y, total in zip(self.maps_of(batch), moments):
                total += moments_of(y)
        for norm, total in zip(norms, moments):
            norm.fit(total if kept else sum_over_ranks(total))
        self.known = kept

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = negative_log_likelihood(self.net.encode(self.maps_of(batch))).mean()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.detach(), batch_size=len(batch["index"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.normal_loss = torch.zeros(2, dtype=torch.float64, device=self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """What `predict_step` gives; sums up the loss of normal images, unless they are seen in tiles."""
        if self._in_tiles(batch["image"]):
            return self.predict_step(batch, batch_idx)
        coded = self.net.encode(self.maps_of(batch))
        losses, normal = negative_log_likelihood(coded), batch["label"] == 0
        self.normal_loss += torch.stack([losses.double()[normal].sum(), normal.sum()])
        return {"index": batch["index"], **self._scored(coded, batch["image"])}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_normal_loss("val/loss")

    def on_test_epoch_end(self) -> None:
        self._log_normal_loss("test/loss")

    def _log_normal_loss(self, name: str) -> None:
        total, count = sum_over_ranks(self.normal_loss).tolist()
        if count:
            self.log(name, total / count)

    def on_validation_end(self) -> None:
        """`validate` leaves the model with the thresholds that it set in `checkpoints/calibrated.ckpt`."""
        if self.trainer.state.fn == TrainerFn.VALIDATING and not self.trainer.fast_dev_run:
            file = Path(self.trainer.default_root_dir, "checkpoints", "calibrated.ckpt")
            self.trainer.save_checkpoint(file)
            rank_zero_info(f"calibrated: {file}")

    def on_predict_start(self) -> None:
        """Refuses thresholds that belong to scores of other settings.

        Raises:
            UserError: so they do.
        """
        self.calibration.check_settings()

    def on_test_start(self) -> None:
        if words := self.calibration.changed():
            rank_zero_warn(f"{words}; image_f1 and pixel_f1 are at these thresholds, of other scores")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`score` `(B,)`, `map` `(B, 1, H, W)`, float32, larger is more anomalous, and `index` `(B,)`."""
        image = batch["image"]
        if not self._in_tiles(image):
            return {"index": batch["index"], **self._scored(self.net.encode(self.maps_of(batch)), image)}
        maps = tiled(lambda piece: self._map(self.net(piece), piece), image, self.tile, self.overlap)
        return {"index": batch["index"], "score": image_score(maps, self.top), "map": maps}

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Score `(B,)` and map `(B, 1, H, W)` of images `(B, 3, H, W)` in [-1, 1]."""
        found = self._scored(self.net(image), image)
        return found["score"], found["map"]

    def _scored(self, coded: Coded, image: Tensor) -> dict[str, Tensor]:
        maps = self._map(coded, image)
        return {"score": image_score(maps, self.top), "map": maps}

    def _map(self, coded: Coded, image: Tensor) -> Tensor:
        return blurred(anomaly_map([z for z, _ in coded], tuple(image.shape[-2:])), self.blur)

    def _in_tiles(self, image: Tensor) -> bool:
        size = tuple(image.shape[-2:])
        if self.tile is None or size == self.tile:
            return False
        if size[0] < self.tile[0] or size[1] < self.tile[1]:
            raise UserError(f"model.tile: found images of {size[0]}x{size[1]} pixels, expected at least {self.tile}")
        return True

    def exportable(self) -> tuple[nn.Module, Tensor, list[str], dict[str, Any]]:
        """What `penstock export` writes: a module of RGB images in [0, 1], an example, and names of what it gives.

        Last come facts that a program using it needs: how images are resized, which share of a map its score is the
        mean of, the tiles that images are seen in and how far these overlap, thresholds of scores and of maps, and
        their ranges.
        """
        facts: dict[str, Any] = {"resize": "bilinear, antialiased", "top": self.top, **self.calibration.facts()}
        if self.tile is not None:
            facts |= {"resize": None, "tile": list(self.tile), "overlap": self.overlap}
        example = torch.rand(1, 3, *(self.tile or self.net.image_size))
        return Detector(self).eval(), example, ["score", "map"], facts

    def configure_optimizers(self) -> Any:
        return optimizers(self)


class Detector(nn.Module):
    """Score `(B,)` and map `(B, 1, H, W)` of RGB images `(B, 3, H, W)` in [0, 1], by a copy of a trained model.

    The same function in fewer operators, see `Backbone.folded` and `FoldedFlow`.
    """

    def __init__(self, model: FastFlow):
        super().__init__()
        net = model.net
        example = torch.zeros(1, 3, *(model.tile or net.image_size), device=net.backbone.mean.device)
        self.top, self.blur = model.top, model.blur
        self.backbone, self.norms = net.backbone.folded(example), copy.deepcopy(net.norms)
        self.flows = nn.ModuleList(FoldedFlow(flow) for flow in net.flows)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        means = [flow(norm(y)) for flow, norm, y in zip(self.flows, self.norms, self.backbone(image))]
        maps = blurred(map_of_means(means, tuple(image.shape[-2:])), self.blur)
        return image_score(maps, self.top), maps

    @torch.no_grad()
    def probe(self, image: Tensor) -> "Detector":
        """A copy to compare exported files by: this image has a `mean_c z^2` of about 1, which `exp` does not hide."""
        result = copy.deepcopy(self)
        for flow, norm, y in zip(result.flows, result.norms, result.backbone(image)):
            flow.weight /= flow(norm(y)).mean()
        return result
