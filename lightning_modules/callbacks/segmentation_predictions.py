"""What `penstock predict` leaves of a segmenter: a mask of every image."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from penstock.lightning_modules.callbacks.prediction_files import make_room, save_picture
from penstock.lightning_modules.callbacks.segmentation_pictures import palette

CLASSES, MASKS = "classes.json", "masks"


class SegmentationPredictions(BasePredictionWriter):
    """Writes `predictions/masks/<file>.png` and `classes.json`: `value`, `name` and `colour` (RGB) of each class.

    A mask has the size of its image; its pixels are numbers of classes from 0, shown in their colours by a palette.
    Files keep their folders, see `picture_name`; they are written as they come. What an earlier prediction wrote into
    the folder is removed at first.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.predict_loop.return_predictions = False
        self.folder = Path(trainer.default_root_dir, "predictions")

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], batch_idx: int, *_: int
    ) -> None:
        """Makes room once nothing more is refused."""
        if batch_idx == 0:
            make_room(trainer, self.folder, [CLASSES], [MASKS])
            if trainer.is_global_zero:
                self._write_classes(pl_module.classes)

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for row, number in enumerate(prediction["index"].tolist()):
            height, width = batch["original_size"][row].tolist()
            mask = prediction["mask"][row, :height, :width].cpu()
            save_picture(self.folder / MASKS, trainer.datamodule.where(number), mask, palette().tobytes())

    def _write_classes(self, names: Sequence[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        colours = palette().tolist()
        rows = [{"value": k, "name": name, "colour": colours[k]} for k, name in enumerate(names)]
        (self.folder / CLASSES).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
