"""Checkpoints of a run: `<run>/checkpoints/last.ckpt`, and the best ones when a metric is watched."""

import signal
import threading
from datetime import timedelta
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that lives in the run folder, whose file names hold no `=`, and that always ends up to date.

    The last state of a run is always saved, whatever the interval. In a single process the first Ctrl-C (or SIGTERM)
    lets the batch finish, saves, and then stops, so that the run resumes to the same bits; a second one stops at once.

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
        self._handlers: dict[int, Any] = {}
        self._stop = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = f"{trainer.default_root_dir}/checkpoints"
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._stop = False
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._request_stop) for s in (signal.SIGINT, signal.SIGTERM)}

    def _request_stop(self, number: int, frame: Any) -> None:
        rank_zero_info("Stopping after this batch; once more to stop at once.")
        self._stop = True
        self._release()

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._stop:
            self._save_now(trainer)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._save_now(trainer)

    def _save_now(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()
        super().on_exception(trainer, pl_module, exception)
