"""Callbacks and networks that the tests name by class path: they copy a run's disk, or go wrong on purpose."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint


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


class BadLoss(Callback):
    """Makes the loss of one rank NaN in one step, by its data.

    Args:
        step: The bad step.
        rank: The bad rank.
    """

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            batch[getattr(pl_module, "key", "image")].fill_(float("nan"))


class DropoutMasks(Callback):
    """Writes which activations a dropout layer of probability 1/2 would drop at each step: `<out>/<rank>.json`."""

    def __init__(self, out: str):
        self.out = Path(out)
        self.masks: list[list[float]] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        state = torch.random.get_rng_state()
        self.masks.append(torch.nn.functional.dropout(torch.ones(64)).tolist())
        torch.random.set_rng_state(state)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{trainer.global_rank}.json").write_text(json.dumps(self.masks))


class Slow(Callback):
    """Sleeps after each batch, so that a signal finds the run at work."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.seconds)


class Interrupt(Callback):
    """A signal in the first batch after `step - 1` steps, unless the run is a resumed one.

    Args:
        step: The step in which it comes.
        sent: Its number: Ctrl-C or SIGTERM.
    """

    def __init__(self, step: int, sent: int):
        self.step, self.sent = step, sent

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1 and not trainer.ckpt_path:
            os.kill(os.getpid(), self.sent)


class NoWaiting(Callback):
    """Makes every wait for the GPU inside a training step an error, from the third step on; listed last.

    Args:
        allowed: Steps that may wait: those where the trainer logs.
    """

    def __init__(self, allowed: list[int]):
        self.allowed = allowed
        self.watched = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > 2 and trainer.global_step + 1 not in self.allowed:
            self.watched += 1
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(trainer.default_root_dir, "watched").write_text(str(self.watched))
