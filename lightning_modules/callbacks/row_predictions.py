"""What writers of predictions share: rows of samples, over all ranks, kept also of a prediction that is stopped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter

from penstock.lightning_modules.callbacks.prediction_files import make_room
from penstock.lightning_modules.callbacks.ranks import gather


class RowPredictions(BasePredictionWriter):
    """Collects rows by the numbers of samples and writes them below `predictions/` in the run folder.

    A subclass puts them into `rows` in `write_on_batch_end`, has `write_rows`, and says in `files` and `folders` what
    it leaves: an earlier prediction's is removed once the first batch is there, when nothing more is refused.

    Attributes:
        folder: `predictions/`.
        rows: Of this rank, by number.
    """

    files: Sequence[str]
    folders: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__(write_interval="batch_and_epoch")

    def write_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[Any]) -> None:
        """Writes rows of all ranks, in the order of their numbers."""
        raise NotImplementedError

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.predict_loop.return_predictions = False
        self.folder, self.rows = Path(trainer.default_root_dir, "predictions"), {}

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Any], batch_idx: int, *_: int
    ) -> None:
        """Makes room."""
        if batch_idx == 0:
            make_room(trainer, self.folder, self.files, self.folders)

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any] | None,
    ) -> None:
        parts, self.rows = gather(self.rows), {}
        if parts is not None:
            self._write(trainer, pl_module, {number: row for part in parts for number, row in part.items()})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keeps the rows so far; with several ranks, which do not stop together, they are lost."""
        if getattr(self, "rows", None) and trainer.world_size == 1:
            self._write(trainer, pl_module, self.rows)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: dict[int, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_rows(trainer, pl_module, [rows[number] for number in sorted(rows)])
