"""What `penstock predict` leaves on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file
from torch import Tensor

from penstock.lightning_modules.callbacks.samples import SHEET, draw
from penstock.lightning_modules.callbacks.video_samples import save_clips


class Predictions(BasePredictionWriter):
    """Writes each batch of predictions as `predictions/rank<r>_<batch>.safetensors`, and the first one as a picture.

    A batch is a dict of tensors that all have the batch as first dimension; `index` tells the samples' numbers. Memory
    stays bounded: nothing is collected.

    Args:
        pictures: Batches that are also drawn, `predictions/rank<r>_<batch>.png`, if they hold images,
            videos (with a GIF beside it) or points.
    """

    def __init__(self, pictures: int = 1):
        super().__init__(write_interval="batch")
        self.pictures = pictures

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.predict_loop.return_predictions = False

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = Path(trainer.default_root_dir, "predictions")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{trainer.global_rank}_{batch_idx:05d}"
        tensors = {key: value.detach().cpu().contiguous() for key, value in prediction.items()}
        save_file(tensors, folder / f"{name}.safetensors")
        if batch_idx < self.pictures:
            drawn = [tensors[key] for key in ("source", "image", "video", "points") if key in tensors]
            labels = tensors.get("label")
            if drawn[-1].ndim == 4:
                n = min(16, len(drawn[-1]))
                draw(torch.cat([d[:n].float() for d in drawn]), n, None).save(folder / f"{name}.png")
            elif drawn[-1].ndim == 5:
                clips = drawn[-1][:SHEET].float()
                draw(clips, 1, None).save(folder / f"{name}.png")
                save_clips(clips, 4, folder / name)
            elif drawn[-1].ndim == 2 and drawn[-1].shape[1] == 2:
                draw(drawn[-1].float(), 1, labels).save(folder / f"{name}.png")
