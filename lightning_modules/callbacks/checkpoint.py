"""Checkpoints of a run: `<run>/checkpoints/last.ckpt`, and the best ones when a metric is watched."""

import signal
import threading
from datetime import timedelta
from typing import Any, Literal

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from penstock.lightning_modules.loggers import RunLogger


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint that lives in the run folder, whose file names hold no `=`, and that always ends up to date.

    The last state of a run is always saved, whatever the interval. In a single process the first Ctrl-C (or SIGTERM)
    lets the batch finish, saves, and then stops, so that the run resumes to the same bits; a second one stops at once.

    A resumed run makes every validation and every row of metrics.csv of one never stopped: a save that falls on a batch
    with a validation or the epoch's end behind it waits for that (Lightning, resumed from before it, would skip it),
    and the metrics of the batch are written before the checkpoint, which knows the last row that belongs to it.
    Lightning's own saves `last.ckpt` only together with a best one; here it is saved at every interval.

    Args:
        monitor: Metric of `metrics.json` whose best values are kept too; None keeps only the last checkpoint.
        mode: Whether small or large values of `monitor` are good.
        save_top_k: How many of the best are kept.
        every_n_epochs: Epochs between two saves; 1 where no interval is given.
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
        self._waits = False
        self._key = super().state_key

    @property
    def state_key(self) -> str:
        """Worked out once: the trainer asks for it at every hook of every step."""
        return self._key

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
        loop = trainer.fit_loop.epoch_loop
        self._waits = self.monitor is None and (
            loop.batch_progress.is_last_batch or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        )
        if not self._waits:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._stop:
            self._save_now(trainer)
            self._leave()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._catch_up(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._catch_up(trainer, pl_module)
        due = self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._waits:
            self._waits = False
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
            if self._stop:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
                self._leave()

    def _leave(self) -> None:
        if not self._waits:
            raise KeyboardInterrupt

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
        pending, step = {}, loop._batches_that_stepped
        if trainer.training and (connector._first_loop_iter is None or connector.should_update_logs):
            pending = convert_tensors_to_scalars(connector.metrics["log"])
            step -= connector._first_loop_iter is None
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                if pending:
                    logger.log_metrics({**pending, "epoch": trainer.current_epoch}, step)
                logger.flush()
                checkpoint["last_row"] = logger.last_row

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger) and trainer.state.fn == TrainerFn.FITTING and "last_row" in checkpoint:
                logger.rewind(checkpoint["last_row"])

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
