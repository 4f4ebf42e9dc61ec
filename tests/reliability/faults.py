"""Callbacks and networks that the tests name by class path: they copy a run's disk, or go wrong on purpose."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class Cuts(Checkpoint):
    """Copies what a kill would leave behind: the run folder with a checkpoint, at named moments.

    Lightning calls it after the run's own `Checkpoint` callback, since it is of that kind and listed later. A resumed
    run, which has the same callbacks, makes none.

    Args:
        out: Where the copies go: `step<n>` after that step, `validated<n>` and `epoch<n>` at the end of epoch n.
        steps: The steps after which a copy is made.
    """

    def __init__(self, out: str, steps: list[int]):
        self.out = Path(out)
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self._cut(trainer, f"step{trainer.global_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cut(trainer, f"validated{trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cut(trainer, f"epoch{trainer.current_epoch}")

    def _cut(self, trainer: Trainer, name: str) -> None:
        if trainer.ckpt_path:
            return
        target = self.out / name
        trainer.save_checkpoint(target / "checkpoints" / "last.ckpt")
        if trainer.is_global_zero:
            for file in ("config.yaml", "metrics.csv", "metrics.json"):
                if (source := Path(trainer.default_root_dir, file)).exists():
                    shutil.copy(source, target / file)
