"""One bar for the whole run, with the time that is left."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class RunProgress(ProgressBar):
    """Shows done/all steps, steps per second, ETA and the latest metrics, for training and for evaluation.

    On a terminal the bar moves in place; elsewhere (a log file) a line is written every `quiet_seconds`.

    Args:
        quiet_seconds: Seconds between two lines where the output is no terminal.
        show: Metrics shown beside the bar.
    """

    def __init__(self, quiet_seconds: float = 15.0, show: tuple[str, ...] = ("train/loss", "val/loss")):
        super().__init__()
        self.quiet_seconds = quiet_seconds
        self.show = tuple(show)
        self._enabled = True
        self._bar: tqdm | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _open(self, what: str, total: float, initial: int = 0) -> None:
        terminal = sys.stderr.isatty()
        if self._enabled:
            self._bar = tqdm(
                total=int(total) if 0 < total < float("inf") else None,
                initial=initial,
                desc=what,
                unit="step",
                dynamic_ncols=terminal,
                ncols=None if terminal else 100,
                mininterval=0.2 if terminal else self.quiet_seconds,
                maxinterval=10 if terminal else self.quiet_seconds,
                miniters=1 if terminal else None,
                file=sys.stderr,
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("fit", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self._bar
        if bar is None or trainer.global_step == bar.n:
            return
        if bar.update(trainer.global_step - bar.n):
            metrics = trainer.callback_metrics
            bar.set_postfix({k: f"{float(metrics[k]):.4g}" for k in self.show if k in metrics}, refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open("predict", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
