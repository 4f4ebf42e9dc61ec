"""What `penstock predict` leaves of a detector: boxes as COCO's JSON, and pictures of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torchvision.transforms.v2 import functional as v2

from penstock.lightning_modules.callbacks.detection_metrics import write_results
from penstock.lightning_modules.callbacks.detection_pictures import chosen, drawn
from penstock.lightning_modules.callbacks.prediction_files import make_room, save_picture
from penstock.lightning_modules.callbacks.ranks import gather
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import written

BOXES, RESULTS, PICTURES = "boxes.json", "results.json", "boxes"


class DetectionPredictions(BasePredictionWriter):
    """Writes `predictions/boxes.json`, as COCO writes annotations, with a `score` for each, and `boxes/<file>.png`.

    Detectors that segment add masks: `segmentation`, run lengths, and ink in the pictures.

    Images of data with annotations keep their `image_id` and `file_name`, and `results.json` has the boxes as
    evaluation servers and pycocotools' `loadRes` take them; pictures of a folder are counted from 0 and have paths
    from it as names.

    Pictures have the size of the original; they are written as they come, see `picture_name`, and only boxes are
    collected. What an earlier prediction wrote into the folder is removed at first.

    Args:
        score: Boxes of larger ones are drawn, in [0, 1]; the file has them all.
        pictures: Whether pictures are written.

    Raises:
        UserError: a score out of range.
    """

    def __init__(self, score: float = 0.3, pictures: bool = True):
        super().__init__(write_interval="batch_and_epoch")
        if not 0 <= score <= 1:
            raise UserError(f"score: {score} given, expected a number in [0, 1]")
        self.score, self.pictures = score, pictures

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.predict_loop.return_predictions = False
        self.folder, self.rows = Path(trainer.default_root_dir, "predictions"), []

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], batch_idx: int, *_: int
    ) -> None:
        """Makes room once nothing more is refused."""
        if batch_idx == 0:
            make_room(trainer, self.folder, [BOXES, RESULTS], [PICTURES])

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: dict[str, Any],
        batch_indices: Sequence[int] | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        names, data = [name for name, _ in pl_module.classes], trainer.datamodule
        for row, number in enumerate(prediction["index"].tolist()):
            boxes, scores, labels = (prediction[name][row].cpu() for name in ("boxes", "scores", "labels"))
            file = data.where(number)
            image = batch["image"][row]
            if "size" in batch:
                height, width = batch["size"][row].tolist()
                image = image[:, :height, :width]
            size = batch["original_size"][row].tolist() if "original_size" in batch else list(image.shape[1:])
            image_id, own_name = data.entry(number) if hasattr(data, "entry") else (number, file)
            masks = prediction["masks"][row] if "masks" in prediction else None
            self.rows.append((number, image_id, own_name, size, boxes, scores, labels, masks))
            if self.pictures:
                at = scores > self.score
                pixels = v2.resize(((image + 1) * 127.5).round().to(torch.uint8).cpu(), size, antialias=True)
                picture = drawn(pixels, boxes[at], labels[at], names, scores[at], chosen(masks, at))
                save_picture(self.folder / PICTURES, file, picture.permute(1, 2, 0))

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any] | None,
    ) -> None:
        parts = gather(self.rows)
        self.rows = []
        if parts is not None:
            self._write(trainer, parts, pl_module.classes)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keeps the boxes of the images so far; with several ranks, which do not stop together, they are lost."""
        if getattr(self, "rows", None) and trainer.world_size == 1:
            self._write(trainer, [self.rows], pl_module.classes)

    def _write(self, trainer: pl.Trainer, parts: list[list[tuple]], classes: list[tuple[str, int]]) -> None:
        images, annotations = [], []
        numbered = {row[0]: row[1:] for part in parts for row in part}
        rows = [numbered[number] for number in sorted(numbered)]
        for image_id, file, (height, width), *found, masks in rows:
            images.append({"id": image_id, "file_name": file, "width": width, "height": height})
            shapes = [{}] * len(found[0]) if masks is None else [{"segmentation": written(mask)} for mask in masks]
            for (x1, y1, x2, y2), score, label, shape in zip(*(column.tolist() for column in found), shapes):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": classes[label][1],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                        "score": score,
                        **shape,
                    }
                )
        categories = [{"id": number, "name": name} for name, number in classes]
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (self.folder / BOXES).write_text(text, encoding="utf-8")
        if hasattr(trainer.datamodule, "entry"):
            names = ("boxes", "scores", "labels", "masks")
            found = [{k: v for k, v in zip(names, row[3:]) if v is not None} for row in rows]
            write_results(self.folder / RESULTS, found, [row[0] for row in rows], [number for _, number in classes])
