"""What `penstock predict` leaves of a model that answers questions about images: a table and a list of the answers."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from penstock.lightning_modules.callbacks.prediction_files import make_room
from penstock.lightning_modules.callbacks.ranks import gather

FILES = ("answers.csv", "answers.json")
COLUMNS = ("index", "name", "question", "answer")


class AnswerPredictions(BasePredictionWriter):
    """Writes `predictions/answers.csv` and `answers.json`: each sample's number, the name of its question or file, what
    was asked, the answer, and in the second the right answers where they are known.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch_and_epoch")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.predict_loop.return_predictions = False
        self.folder, self.rows = Path(trainer.default_root_dir, "predictions"), {}
        make_room(trainer, self.folder, FILES, [])

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

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any] | None,
    ) -> None:
        parts, self.rows = gather(self.rows), {}
        if parts is not None:
            self._write({number: row for part in parts for number, row in part.items()})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keeps the answers so far; with several ranks, which do not stop together, they are lost."""
        if getattr(self, "rows", None) and trainer.world_size == 1:
            self._write(self.rows)

    def _write(self, rows: dict[int, dict[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        ordered = [rows[number] for number in sorted(rows)]
        with (self.folder / FILES[0]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(ordered)
        text = json.dumps(ordered, ensure_ascii=False, indent=1)
        (self.folder / FILES[1]).write_text(f"{text}\n", encoding="utf-8")
