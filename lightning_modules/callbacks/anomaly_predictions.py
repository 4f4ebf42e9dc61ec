"""What `penstock predict` leaves of an anomaly model: scores, heat maps and masks of every image."""

import csv
import json
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import interpolate

from penstock.lightning_modules.callbacks.anomaly_pictures import above, heat
from penstock.lightning_modules.callbacks.prediction_files import save_picture
from penstock.lightning_modules.callbacks.row_predictions import RowPredictions

COLUMNS = ("file", "score", "normalized", "anomalous")
NEEDED = {"heat maps": "map_range", "masks": "pixel_threshold"}
FOLDERS = {"heat maps": "heat", "masks": "masks"}
SCORES = ("scores.csv", "scores.json")


class AnomalyPredictions(RowPredictions):
    """Writes `scores.csv`, `scores.json`, `heat/<file>.png` and `masks/<file>.png` into `predictions/`.

    `score` is the model's own, `normalized` in [0, 1] with the threshold at 0.5, `anomalous` whether it is reached. The
    colours of heat maps are those of the calibration, the same for all images. A mask is 255 where the map reaches the
    threshold of pixels; models that were validated on images without masks have none, which is said. Where the batch
    has `original_size` `(B, 2)`, maps are resized to it (bilinear) and laid over the data's `original(number)`, else
    pictures have the size that the model saw. Files keep their folders, see `picture_name`. Pictures are written as
    they come; only scores are collected. What an earlier prediction wrote into the folder is removed at first.

    Args:
        pictures: Whether heat maps and masks are written.
    """

    files, folders = SCORES, tuple(FOLDERS.values())

    def __init__(self, pictures: bool = True):
        super().__init__()
        self.pictures = pictures

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a model whose threshold was never set.

        Raises:
            UserError: so it is.
        """
        pl_module.calibration.check("image_threshold")
        known = pl_module.calibration.facts()
        lacking = {kind: name for kind, name in NEEDED.items() if name not in known}
        if self.pictures and lacking:
            kinds, names = (" and no ".join(words) for words in (lacking, lacking.values()))
            rank_zero_info(
                f"predictions: no {kinds}: the checkpoint has no {names} (model not validated on images with masks)"
            )
        self.kinds = [kind for kind in NEEDED if self.pictures and kind not in lacking]
        super().on_predict_start(trainer, pl_module)

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
        calibration, numbers = pl_module.calibration, prediction["index"].tolist()
        files = [trainer.datamodule.where(number) for number in numbers]
        scores = prediction["score"].double()
        columns = (files, scores.tolist(), calibration.scores(scores).tolist())
        reached = (scores >= calibration.image_threshold).tolist()
        self.rows |= dict(zip(numbers, zip(*columns, reached)))
        for row, (number, file) in enumerate(zip(numbers, files)):
            seen, found = batch["image"][row, None], prediction["map"][row, None]
            size = batch["original_size"][row].tolist() if "original_size" in batch else list(found.shape[-2:])
            if resized := size != list(found.shape[-2:]):
                found = interpolate(found, size, mode="bilinear")
            if "heat maps" in self.kinds:
                seen = trainer.datamodule.original(number)[None] if resized else seen
                self._save("heat maps", file, heat(seen, calibration.colours(found))[0].permute(1, 2, 0))
            if "masks" in self.kinds:
                self._save("masks", file, above(found, calibration.pixel_threshold)[0, 0].cpu())

    def _save(self, kind: str, file: str, picture: Tensor) -> None:
        save_picture(self.folder / FOLDERS[kind], file, picture)

    def write_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[tuple]) -> None:
        """Both files of scores."""
        with (self.folder / SCORES[0]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((name, score, normalized, int(found)) for name, score, normalized, found in rows)
        report = {**pl_module.calibration.facts(), "images": [dict(zip(COLUMNS, row)) for row in rows]}
        (self.folder / SCORES[1]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
