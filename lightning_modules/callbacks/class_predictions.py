"""What `penstock predict` leaves of a classifier: a table of the images' classes."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from penstock.lightning_modules.callbacks.prediction_files import make_room
from penstock.lightning_modules.callbacks.ranks import gather
from penstock.lightning_modules.errors import UserError

FILE = "classes.csv"


class ClassPredictions(BasePredictionWriter):
    """Writes `predictions/classes.csv`: each image's number, its file where it has one, its label where it is known,
    and the most probable classes with their probabilities.

    Args:
        top: Number of these, at least 1.

    Raises:
        UserError: a number below 1.
    """

    def __init__(self, top: int = 3):
        super().__init__(write_interval="batch_and_epoch")
        if top < 1:
            raise UserError(f"top: {top} given, expected at least 1")
        self.top = top

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.predict_loop.return_predictions = False
        self.folder, self.rows = Path(trainer.default_root_dir, "predictions"), {}
        make_room(trainer, self.folder, [FILE], [])

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
        names = pl_module.classes
        found = prediction["probabilities"].topk(min(self.top, len(names)))
        where = getattr(trainer.datamodule, "where", lambda number: "")
        labels = [names[label] for label in batch["label"].tolist()] if "label" in batch else [""] * len(batch["index"])
        for number, label, *best in zip(prediction["index"].tolist(), labels, *(x.tolist() for x in found[::-1])):
            pairs = [cell for k, p in zip(*best) for cell in (names[k], f"{p:.6f}")]
            self.rows[number] = [number, where(number), label, *pairs]

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any] | None,
    ) -> None:
        parts, self.rows = gather(self.rows), {}
        if parts is not None:
            self._write({number: row for part in parts for number, row in part.items()}, len(pl_module.classes))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keeps the classes so far; with several ranks, which do not stop together, they are lost."""
        if getattr(self, "rows", None) and trainer.world_size == 1:
            self._write(self.rows, len(pl_module.classes))

    def _write(self, rows: dict[int, list[Any]], classes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ranked = [name for k in range(1, min(self.top, classes) + 1) for name in (f"class_{k}", f"probability_{k}")]
        with (self.folder / FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "file", "label", *ranked])
            writer.writerows(rows[number] for number in sorted(rows))
