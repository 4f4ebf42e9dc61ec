"""How fast a run trains and how much memory it takes."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Throughput(Callback):
    """Steps and samples a second, peak memory, and the pure training time.

    Every `trainer.log_every_n_steps` steps (batches after which an optimiser stepped) logs
    `throughput/steps_per_second`, `throughput/samples_per_second` (over all ranks) and `throughput/peak_memory_gib` (of
    rank 0: CUDA allocations, or the resident set without a GPU). At the end of each epoch logs `train_seconds`: wall
    time spent in training epochs so far, without set-up, validation and sampling; a resumed run goes on counting.
    Between two readings nothing waits for the device. The loggers get the readings without the trainer's bookkeeping
    of metrics, which costs milliseconds.
    """

    def __init__(self) -> None:
        """Begins at zero."""
        self.train_seconds = 0.0
        self._since: float | None = None
        self._mark = (0.0, 0)
        self._samples = 0
        self._optimiser_steps = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins the first reading; a run resumed within an epoch has no start of an epoch."""
        self._since = time.perf_counter()
        self._mark, self._samples = (self.train_seconds, trainer.fit_loop.epoch_loop._batches_that_stepped), 0
        self._optimiser_steps = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock while a validation interrupts training."""
        self._stop(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on after a validation within an epoch."""
        if not trainer.sanity_checking:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Counts, and logs when the trainer logs."""
        self._samples += len(batch["index"])
        if trainer.global_step == self._optimiser_steps:
            return
        self._optimiser_steps = trainer.global_step
        step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        if step % trainer.log_every_n_steps:
            return
        self._stop(pl_module.device)
        self._since = time.perf_counter()
        seconds, steps = self.train_seconds - self._mark[0], step - self._mark[1]
        readings = {
            "throughput/steps_per_second": steps / seconds,
            "throughput/samples_per_second": self._samples * trainer.world_size / seconds,
            "throughput/peak_memory_gib": peak_memory(pl_module.device) / 2**30,
        }
        for logger in trainer.loggers:
            logger.log_metrics(readings, step - 1)
        self._mark, self._samples = (self.train_seconds, step), 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock and logs the time so far."""
        self._stop(pl_module.device)
        pl_module.log("train_seconds", self.train_seconds, sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return {"train_seconds": self.train_seconds + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the time so far."""
        self.train_seconds = state_dict["train_seconds"]

    def _stop(self, device: torch.device) -> None:
        if self._since is None:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.train_seconds += time.perf_counter() - self._since
        self._since = None


def peak_memory(device: torch.device) -> int:
    """Bytes: the peak of CUDA allocations on `device`, or the peak resident set of this process without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
