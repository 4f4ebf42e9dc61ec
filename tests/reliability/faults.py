"""Callbacks and networks that the tests name by class path: they copy a run's disk, or go wrong on purpose."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint


class Cuts(Checkpoint):
    """Copies what a kill would leave on disk: the run folder, at named moments.

    Lightning calls it after the run's own `Checkpoint` callback, since it is of that kind and listed later. A resumed
    run, which has the same callbacks, makes no copies.

    Args:
        out: Where the copies go: `step<n>` after step n, `validated<n>` and `epoch<n>` after that step's validation and
            epoch.
    """

    def __init__(self, out: str):
        self.out = Path(out)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._cut(trainer, "step")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cut(trainer, "validated")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cut(trainer, "epoch")

    def _cut(self, trainer: Trainer, moment: str) -> None:
        if trainer.is_global_zero and not trainer.ckpt_path:
            target = self.out / f"{moment}{trainer.global_step}"
            shutil.copytree(trainer.default_root_dir, target, dirs_exist_ok=True)
