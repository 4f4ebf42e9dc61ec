"""What `penstock predict` leaves of a detector: boxes as COCO's JSON, and pictures of them."""

import json
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torchvision.transforms.v2 import functional as v2

from penstock.lightning_modules.callbacks.detection_metrics import write_results
from penstock.lightning_modules.callbacks.detection_pictures import chosen, drawn
from penstock.lightning_modules.callbacks.prediction_files import save_picture
from penstock.lightning_modules.callbacks.row_predictions import RowPredictions
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import written

BOXES, RESULTS, PICTURES = "boxes.json", "results.json", "boxes"


class DetectionPredictions(RowPredictions):
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

    files, folders = (BOXES, RESULTS), (PICTURES,)

    def __init__(self, score: float = 0.3, pictures: bool = True):
        super().__init__()
        if not 0 <= score <= 1:
            raise UserError(f"score: {score} given, expected a number in [0, 1]")
        self.score, self.pictures = score, pictures

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
            self.rows[number] = (image_id, own_name, size, boxes, scores, labels, masks)
            if self.pictures:
                at = scores > self.score
                pixels = v2.resize(((image + 1) * 127.5).round().to(torch.uint8).cpu(), size, antialias=True)
                picture = drawn(pixels, boxes[at], labels[at], names, scores[at], chosen(masks, at))
                save_picture(self.folder / PICTURES, file, picture.permute(1, 2, 0))

    def write_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[tuple]) -> None:
        """Both files, the second for data with annotations."""
        images, annotations, classes = [], [], pl_module.classes
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
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (self.folder / BOXES).write_text(text, encoding="utf-8")
        if hasattr(trainer.datamodule, "entry"):
            names = ("boxes", "scores", "labels", "masks")
            found = [{k: v for k, v in zip(names, row[3:]) if v is not None} for row in rows]
            write_results(self.folder / RESULTS, found, [row[0] for row in rows], [number for _, number in classes])
