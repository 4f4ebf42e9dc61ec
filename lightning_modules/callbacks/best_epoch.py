"""The best epoch of a fit: its metrics, and its checkpoint."""

import math
from pathlib import Path

import lightning.pytorch as pl


class BestEpoch:
    """Keeps the metrics of the epoch whose `monitor` is largest, of equal ones the first, and `checkpoints/best.ckpt`.

    Args:
        monitor: Metric.
        save: Whether the checkpoint is kept.

    Attributes:
        values: Metrics of the best epoch so far and its number `epoch`, from 0; empty before there is one.
    """

    def __init__(self, monitor: str, save: bool = True):
        self.monitor, self.save = monitor, save
        self.clear()

    def clear(self) -> None:
        """Forgets it: another fit begins."""
        self.values: dict[str, float] = {}
        self._improved = False

    def see(self, trainer: pl.Trainer, found: dict[str, float]) -> dict[str, float]:
        """Takes the metrics of an epoch; gives those of the best one by the names they are logged as.

        These begin with `best_on_val/` or, where `val_is_test` of the data says that they validate on the test images,
        which makes such a best optimistic, with `best_on_test/`.
        """
        self._improved = self.monitor in found and found[self.monitor] > self.values.get(self.monitor, -math.inf)
        if self._improved:
            self.values = {**found, "epoch": float(trainer.current_epoch)}
        where = "test" if getattr(trainer.datamodule, "val_is_test", False) else "val"
        return {f"best_on_{where}/{name}": value for name, value in self.values.items()}

    def keep(self, trainer: pl.Trainer) -> None:
        """Saves the epoch that was seen last, if it is the best one: to be called once its metrics are logged."""
        if self._improved and self.save and not trainer.fast_dev_run:
            trainer.save_checkpoint(Path(trainer.default_root_dir, "checkpoints", "best.ckpt"), weights_only=False)
        self._improved = False
