"""How well anomalies are told from normal images and pixels, thresholds for the model, and the best epoch."""

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from penstock.lightning_modules.callbacks.best_epoch import BestEpoch
from penstock.lightning_modules.callbacks.ranks import broadcast, gather
from penstock.lightning_modules.callbacks.score_counts import ScoreCounts
from penstock.lightning_modules.callbacks.score_curve import Measured
from penstock.lightning_modules.errors import UserError

Monitor = Literal["image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"]


class AnomalyMetrics(pl.Callback):
    """Scores what `validation_step` and `test_step` of an anomaly model return, over all ranks and exactly.

    Both return `index` `(B,)`, `score` `(B,)` and `map` `(B, 1, H, W)`, larger = more anomalous; the batch holds
    `label` `(B,)`, 0 = normal, and `mask` `(B, 1, H, W)`, 0 = normal, where defects are known by pixels.

    Logs `image_auroc`, `image_ap`, `image_f1_max`, `image_f1_max_threshold` (where F1 is largest on this split), the
    same of `pixel_`, and `aupro`: as `val/<name>` in a fit and by `validate`, under these names by `test`. A metric
    that a split doesn't define, having no anomalies or nothing else, is warned of and not logged. `test` adds
    `image_threshold` and `pixel_threshold`, those in the checkpoint, by which `predict` decides, and `image_f1` and
    `pixel_f1` at them.

    Every validation sets the module's `calibration`: thresholds of the largest F1 on its split, and ranges, that of
    maps also without masks. Without anomalies the threshold is the largest normal score or pixel, without normal ones
    the smallest. This is done before `on_validation_end`, the first moment at which Lightning and `Checkpoint` save
    after a validation. A fit that ends without a threshold, as none of its epochs was validated, is warned of.

    The best epoch so far is logged as `best_on_val/<name>` and `best_on_val/epoch` (from 0, as `epoch`), or as
    `best_on_test/...` where `val_is_test` of the data says that they validate on the test images: such a best is
    optimistic. It is kept in the checkpoint, so that a resumed run goes on.

    Args:
        monitor: Metric whose largest value makes the best epoch; of equal ones the first.
        fpr_limit: False positive rate up to which AUPRO is integrated, in (0, 1].
        pixels: Whether pixels are scored too, 40 to 70 ms of a core for each image of 1024 px.
        save_best: Whether the best epoch is kept as `checkpoints/best.ckpt`.

    Raises:
        UserError: an unknown limit; a module without `calibration`; outputs or masks that are not as above; scores
            that are not finite; a monitored metric of pixels without masks.
    """

    def __init__(
        self, monitor: Monitor = "image_auroc", fpr_limit: float = 0.3, pixels: bool = True, save_best: bool = True
    ):
        if not 0 < fpr_limit <= 1:
            raise UserError(f"fpr_limit: {fpr_limit} given, expected a number in (0, 1]")
        if not pixels and not monitor.startswith("image_"):
            raise UserError(f"monitor: {monitor} is not measured with pixels=false; expected a metric of images")
        self.monitor, self.fpr_limit, self.pixels = monitor, fpr_limit, pixels
        self.best = BestEpoch(monitor, save_best)
        self._begin()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.best.clear()
        if stage != "predict" and not hasattr(pl_module, "calibration"):
            raise UserError(
                f"AnomalyMetrics: {type(pl_module).__name__} has no calibration, expected an anomaly model (its "
                "validation_step returns index, score and map)"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._add(outputs, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        ends = self._ends()
        image, pixel = self._measured("validation")
        if image is None:
            return
        pl_module.calibration.set(
            _threshold(image),
            None if pixel is None else _threshold(pixel),
            (image.lowest, image.highest),
            ends,
        )
        found = _named(image, pixel)
        self._log(pl_module, found, "val/")
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if pixel is None and not self.monitor.startswith("image_"):
            raise UserError(f"monitor: {self.monitor} needs masks, and the batches hold none", everywhere=True)
        self._log(pl_module, self.best.see(trainer, found), "")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.best.keep(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.calibration.image_threshold.isnan():
            rank_zero_warn(
                "AnomalyMetrics: this fit ended without a validation, so its checkpoint has no thresholds and predict "
                "will refuse it; train with validations, as by trainer.check_val_every_n_epoch=1, or calibrate it: "
                "penstock validate ckpt_path=FILE"
            )

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = pl_module.calibration
        known = {"image": _known(own.image_threshold), "pixel": _known(own.pixel_threshold)}
        image, pixel = self._measured("test", *known.values())
        if image is None:
            return
        found = _named(image, pixel)
        for what, threshold in known.items():
            if threshold is not None and (what == "image" or pixel is not None):
                found[f"{what}_threshold"] = threshold
        self._log(pl_module, found, "")

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the best epoch so far."""
        return {"best": self.best.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best.values = dict(state_dict["best"])

    def _begin(self) -> None:
        self._images, self._pixels, self._bad = ScoreCounts(), ScoreCounts(), []
        self._lowest, self._highest = math.inf, -math.inf

    def _add(self, outputs: Any, batch: dict[str, Any]) -> None:
        """Takes one batch, with one wait for the device."""
        if not isinstance(outputs, dict) or not {"index", "score", "map"} <= outputs.keys():
            found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise UserError(f"outputs of a step: {found} found, expected index, score and map", everywhere=True)
        maps, masks = outputs["map"], batch.get("mask") if self.pixels else None
        if masks is not None and maps.shape != masks.shape:
            raise UserError(f"map: shape {tuple(maps.shape)}, expected that of the mask, {tuple(masks.shape)}")
        finite = outputs["score"].isfinite() & maps.isfinite().flatten(1).all(1)
        ends = torch.stack(maps.aminmax()).float()
        held = [outputs["index"], outputs["score"].float(), batch["label"] != 0, finite, ends]
        index, scores, labels, finite, ends, *rest = _on_cpu(
            *held, *([] if masks is None else [maps.float(), masks > 0])
        )
        self._lowest, self._highest = min(self._lowest, float(ends[0])), max(self._highest, float(ends[1]))
        self._bad += index[~finite].tolist()
        self._images.update(scores[finite].numpy(), labels[finite].numpy())
        for scores, mask in zip(*(column[finite, 0].numpy() for column in rest)):
            self._pixels.update_map(scores, mask)

    def _ends(self) -> tuple[float, float]:
        """Smallest and largest value of maps over all ranks, on each of them."""
        parts = gather((self._lowest, self._highest))
        return broadcast(parts and (min(low for low, _ in parts), max(high for _, high in parts)))

    def _measured(
        self, split: str, image_threshold: float | None = None, pixel_threshold: float | None = None
    ) -> tuple[Measured | None, Measured | None]:
        """Metrics of images and pixels over all ranks, on each of them."""
        bad = gather(self._bad)
        bad = broadcast(None if bad is None else sorted(index for part in bad for index in part))
        if bad:
            raise UserError(
                f"score: NaN or infinite for image {bad[0]} of the {split} split, and for {len(bad) - 1} others; "
                "expected finite scores and maps",
                everywhere=True,
            )
        image = self._images.measure(at=image_threshold)
        pixel = self._pixels.measure(self.fpr_limit, at=pixel_threshold)
        self._begin()
        for what, found in (("image", image), ("pixel", pixel)):
            if found is not None and found.auroc is None:
                only = "anomalous" if found.anomalous else "normal"
                names = f"{what}_auroc, {what}_ap and {what}_f1_max" + ("" if what == "image" else ", and aupro,")
                rank_zero_warn(
                    f"AnomalyMetrics: all {what}s of the {split} split are {only}; {names} are undefined and not logged"
                )
        return image, pixel

    def _log(self, pl_module: pl.LightningModule, values: dict[str, float], prefix: str) -> None:
        pl_module.log_dict({f"{prefix}{name}": value for name, value in values.items()}, batch_size=1, sync_dist=True)


def _on_cpu(*values: Tensor) -> list[Tensor]:
    copies = [value.detach().to("cpu", non_blocking=True) for value in values]
    if any(value.is_cuda for value in values):
        torch.cuda.current_stream(values[0].device).synchronize()
    return copies


def _threshold(found: Measured) -> float:
    if found.threshold is not None:
        return found.threshold
    return found.lowest if found.anomalous else found.highest


def _known(threshold: Tensor) -> float | None:
    return None if threshold.isnan() else float(threshold)


def _named(image: Measured, pixel: Measured | None) -> dict[str, float]:
    values: dict[str, float | None] = {}
    for what, found in (("image", image), ("pixel", pixel)):
        if found is not None:
            values |= {f"{what}_{name}": getattr(found, name) for name in ("auroc", "ap", "f1_max", "f1")}
            values[f"{what}_f1_max_threshold"] = found.threshold
    values["aupro"] = None if pixel is None else pixel.aupro
    return {name: value for name, value in values.items() if value is not None}
