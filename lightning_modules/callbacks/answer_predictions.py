"""What `penstock predict` leaves of a model that answers questions about images: a table and a list of the answers."""

import csv
import json
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from penstock.lightning_modules.callbacks.row_predictions import RowPredictions

FILES = ("answers.csv", "answers.json")
COLUMNS = ("index", "name", "question", "answer")


class AnswerPredictions(RowPredictions):
    """Writes `predictions/answers.csv` and `answers.json`: each sample's number, the name of its question or file, what
    was asked, the answer, and in the second the right answers where they are known.
    """

    files = FILES

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
        numbers = prediction["index"].tolist()
        known = batch.get("answers", [()] * len(numbers))
        for number, question, answer, right in zip(numbers, prediction["question"], prediction["answer"], known):
            row = dict(zip(COLUMNS, (number, trainer.datamodule.where(number), question, answer)))
            self.rows[number] = row | ({"right": list(right)} if right else {})

    def write_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[dict[str, Any]]) -> None:
        """Both files."""
        with (self.folder / FILES[0]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        (self.folder / FILES[1]).write_text(f"{text}\n", encoding="utf-8")
