"""COCO's average precision of detected boxes, and their file for evaluation servers."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from penstock.lightning_modules.callbacks.best_epoch import BestEpoch
from penstock.lightning_modules.callbacks.ranks import broadcast, gather
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import decoded, written

NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
    "mar_1": "ar_1",
    "mar_10": "ar_10",
    "mar_100": "ar_100",
    "mar_small": "ar_small",
    "mar_medium": "ar_medium",
    "mar_large": "ar_large",
}

TARGETS = ("boxes", "labels", "iscrowd", "area")

Monitor = Literal["ap", "ap50", "ap75", "ar_100", "mask_ap"]


class DetectionMetrics(pl.Callback):
    """Scores what `validation_step` and `test_step` of a detector return, over all ranks, as COCO does (torchmetrics).

    Both return `index` `(B,)` and lists of `boxes` `(n, 4)`, x1 y1 x2 y2 in pixels of the original images, `scores` and
    `labels` `(n,)`, of detectors that segment also `masks`, n run lengths; the data offer `targets(index)`,
    `class_names` and `category_ids`.

    Logs `ap` (mean over overlaps of 0.5 to 0.95), `ap50`, `ap75`, those of small, medium and large objects (areas up to
    32^2, 96^2 and above), `ar_1`, `ar_10`, `ar_100` and their sizes, and `ap_of/<class>`; of masks the same as
    `mask_ap` and so on. In a fit and by `validate` they are called `val/<name>`, by `test` as here. What a split has no
    objects for is not logged. `test` and `validate` write `detections/<split>.json` in the run folder, in COCO's format
    of results.

    A fit also logs those without a slash of its best epoch so far, and `epoch`, as `best_on_val/<name>`, or
    `best_on_test/<name>` where the validation images are the test images; the best is kept in the checkpoint.

    Args:
        monitor: Metric whose largest value makes the best epoch; of equal ones the first.
        save_best: Whether the best epoch is kept as `checkpoints/best.ckpt`.

    Raises:
        UserError: a package that is missing, data without targets, or outputs that are not as above.
    """

    def __init__(self, monitor: Monitor = "ap", save_best: bool = True) -> None:
        if importlib.util.find_spec("faster_coco_eval") is None:
            raise UserError("DetectionMetrics: faster_coco_eval is missing; install it: pip install faster-coco-eval")
        self.best = BestEpoch(monitor, save_best)
        self._seen: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.best.clear()
        if stage != "predict" and not hasattr(trainer.datamodule, "targets"):
            raise UserError(
                f"DetectionMetrics: {type(trainer.datamodule).__name__} has no targets, expected data with boxes"
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = []

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
        if not isinstance(outputs, dict) or not {"index", "boxes", "scores", "labels"} <= outputs.keys():
            found = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise UserError(f"outputs of a step: {found} found, expected index, boxes, scores and labels")
        for row, index in enumerate(outputs["index"].tolist()):
            one = {name: outputs[name][row].detach().cpu() for name in ("boxes", "scores", "labels")}
            more = {"masks": outputs["masks"][row]} if "masks" in outputs else {}
            self._seen.append({"index": index, **one, **more})

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._finish(trainer, pl_module, "val", "val/")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish(trainer, pl_module, "test", "")

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str, prefix: str) -> None:
        parts, values = gather(self._seen), None
        if parts is not None:
            seen = sorted({one["index"]: one for part in parts for one in part}.values(), key=lambda one: one["index"])
            targets = trainer.datamodule.targets(torch.tensor([one["index"] for one in seen], dtype=torch.int64))
            values = average_precision(seen, targets, trainer.datamodule.class_names)
            if not trainer.training and not trainer.fast_dev_run:
                file = Path(trainer.default_root_dir, "detections", f"{split}.json")
                image_ids = [int(target["image_id"]) for target in targets]
                write_results(file, seen, image_ids, trainer.datamodule.category_ids)
        self._seen = []
        values = broadcast(values)
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


def average_precision(
    found: list[dict[str, Any]], targets: list[dict[str, Any]], class_names: list[str]
) -> dict[str, float]:
    """COCO's metrics by our names, those that the targets define; those of masks where both sides have them.

    Thresholds are COCO's, in double precision: torchmetrics' own are rounded to float32, which moves AP by 0.002 where
    overlaps or recalls lie on them. Of masks alone it leaves out images without objects, and what is found there; so
    it is always given the boxes, too.

    Args:
        found: `boxes`, `scores` and `labels` of each image, perhaps `masks`.
        targets: `boxes`, `labels`, `iscrowd` and `area` of each image, perhaps `masks`.
        class_names: Of the labels.
    """
    masked = any("masks" in one for one in found) and any("masks" in target for target in targets)
    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm") if masked else "bbox",
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        class_metrics=True,
        backend="faster_coco_eval",
        sync_on_compute=False,
    )
    metric.warn_on_many_detections = False
    for one, target in zip(found, targets):  # one by one: masks are written out for as long as they are read
        metric.update([_image(one, ("boxes", "scores", "labels"), masked)], [_image(target, TARGETS, masked)])
    raw = metric.compute()
    values = {}
    for ours, theirs in (("", "bbox_" if masked else ""), ("mask_", "segm_"))[: 1 + masked]:
        values |= {ours + name: float(raw[theirs + key]) for key, name in NAMES.items()}
        classes, each = raw["classes"].reshape(-1).tolist(), raw[f"{theirs}map_per_class"].reshape(-1).tolist()
        values |= {f"{ours}ap_of/{class_names[label]}": value for label, value in zip(classes, each)}
    return {name: value for name, value in values.items() if value >= 0}


def _image(one: dict[str, Any], names: Sequence[str], masked: bool) -> dict[str, Tensor]:
    """What torchmetrics reads of an image."""
    found = {name: one[name] for name in names}
    if masked:
        size = tuple(one["masks"][0]["size"]) if one["masks"] else (1, 1)
        found["masks"] = decoded(one["masks"], size).bool()
    return found


def write_results(file: Path, found: list[dict[str, Any]], image_ids: list[int], category_ids: list[int]) -> None:
    """Writes boxes as evaluation servers take them; `bbox` is x, y, width, height.

    Args:
        file: List of COCO's results, JSON.
        found: `boxes`, `scores` and `labels` of each image, perhaps `masks`.
        image_ids: Of the images.
        category_ids: Of the labels.
    """
    rows = []
    for one, image_id in zip(found, image_ids):
        boxes = torch.cat([one["boxes"][:, :2], one["boxes"][:, 2:] - one["boxes"][:, :2]], 1).double()
        shapes = [{"segmentation": written(mask)} for mask in one["masks"]] if "masks" in one else [{}] * len(boxes)
        values = (one[name].tolist() for name in ("scores", "labels"))
        for box, score, label, segmentation in zip(boxes.tolist(), *values, shapes):
            rows.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": [round(x, 3) for x in box],
                    "score": round(score, 6),
                    **segmentation,
                }
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")
