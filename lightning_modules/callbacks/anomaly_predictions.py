"""What `penstock predict` leaves of an anomaly model: scores, heat maps and masks of every image."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from penstock.lightning_modules.callbacks.anomaly_pictures import above, heat
from penstock.lightning_modules.callbacks.ranks import gather

COLUMNS = ("file", "score", "normalized", "anomalous")
NEEDED = {"heat maps": "map_range", "masks": "pixel_threshold"}


class AnomalyPredictions(BasePredictionWriter):
    """Writes `scores.csv`, `scores.json`, `heat/<file>.png` and `masks/<file>.png` into `predictions/`.

    `score` is the model's own, `normalized` in [0, 1] with the threshold at 0.5, `anomalous` whether it is reached. The
    colours of heat maps are those of the calibration, the same for all images. A mask is 255 where the map reaches the
    threshold of pixels; models that were validated on images without masks have none, which is said. Files keep their
    folders; one that is no PNG gets `.png` behind its name. Pictures are written as they come; only scores are
    collected.

    Args:
        pictures: Whether heat maps and masks are written.
    """

    def __init__(self, pictures: bool = True):
        super().__init__(write_interval="batch_and_epoch")
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
        trainer.predict_loop.return_predictions = False
        self.folder, self.rows = Path(trainer.default_root_dir, "predictions"), []

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
        self.rows += [(number, *row) for number, *row in zip(numbers, *columns, reached)]
        maps = prediction["map"]
        if "heat maps" in self.kinds:
            self._save("heat", files, heat(batch["image"], calibration.colours(maps)).permute(0, 2, 3, 1))
        if "masks" in self.kinds:
            self._save("masks", files, above(maps, calibration.pixel_threshold)[:, 0].cpu())

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
            self._write(parts, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keeps the scores of the images so far; with several ranks, which do not stop together, they are lost."""
        if getattr(self, "rows", None) and trainer.world_size == 1:
            self._write([self.rows], pl_module)

    def _save(self, kind: str, files: list[str], pictures: Tensor) -> None:
        for name, picture in zip(files, pictures):
            place = self.folder / kind / (name if name.endswith(".png") else f"{name}.png")
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.contiguous().numpy()).save(place)

    def _write(self, parts: list[list[tuple]], pl_module: pl.LightningModule) -> None:
        """Both files of scores, by the ranks' rows."""
        rows = [row[1:] for row in sorted({row[0]: row for part in parts for row in part}.values())]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows((name, score, normalized, int(found)) for name, score, normalized, found in rows)
        report = {**pl_module.calibration.facts(), "images": [dict(zip(COLUMNS, row)) for row in rows]}
        (self.folder / "scores.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
