"""What `penstock predict` leaves of a classifier: a table of the images' classes."""

import csv
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from penstock.lightning_modules.callbacks.row_predictions import RowPredictions
from penstock.lightning_modules.errors import UserError

FILE = "classes.csv"


class ClassPredictions(RowPredictions):
    """Writes `predictions/classes.csv`: each image's number, its file where it has one, its label where it is known,
    and the most probable classes with their probabilities.

    Args:
        top: Number of these, at least 1.

    Raises:
        UserError: a number below 1.
    """

    files = (FILE,)

    def __init__(self, top: int = 3):
        super().__init__()
        if top < 1:
            raise UserError(f"top: {top} given, expected at least 1")
        self.top = top

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

    def write_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[list[Any]]) -> None:
        """The table."""
        top = min(self.top, len(pl_module.classes))
        ranked = [name for k in range(1, top + 1) for name in (f"class_{k}", f"probability_{k}")]
        with (self.folder / FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "file", "label", *ranked])
            writer.writerows(rows)
