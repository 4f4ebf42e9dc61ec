"""Checkpoints of a run: `<run>/checkpoints/last.ckpt`, and the best ones when a metric is watched."""

from datetime import timedelta
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that lives in the run folder and whose file names hold no `=`.

    Args:
        monitor: Metric of `metrics.json` whose best values are kept too; None keeps only the last checkpoint.
        mode: Whether small or large values of `monitor` are good.
        save_top_k: How many of the best are kept.
        every_n_epochs: Epochs between two saves.
        every_n_train_steps: Steps between two saves (instead of epochs).
        every_minutes: Minutes between two saves (instead of epochs or steps).
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        every_minutes: float | None = None,
    ):
        super().__init__(
            filename="step_{step:07d}",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=save_top_k if monitor else 0,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=timedelta(minutes=every_minutes) if every_minutes else None,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=None if monitor else True,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = f"{trainer.default_root_dir}/checkpoints"
        super().setup(trainer, pl_module, stage)
