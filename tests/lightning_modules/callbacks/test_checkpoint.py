"""When `last.ckpt` is written; what it holds is tested in tests/reliability."""

from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from penstock.lightning_modules.callbacks.checkpoint import Checkpoint
from penstock.lightning_modules.checkpoints import load_checkpoint


class Watched(BoringModel):
    """Reports a validation metric that only gets worse."""

    def validation_step(self, batch, batch_idx):
        self.log("worse", float(self.current_epoch))


class Look(Callback):
    """The step that `last.ckpt` holds at the start of each epoch; None where there is no file."""

    def __init__(self):
        self.found = []

    def on_train_epoch_start(self, trainer, pl_module):
        path = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
        self.found.append(load_checkpoint(path)["global_step"] if path.exists() else None)


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ({}, [None, 2, 4, 6]),
        ({"every_n_epochs": 2}, [None, None, 4, 4]),
        ({"every_n_train_steps": 3}, [None, None, 3, 6]),
        ({"every_minutes": 60}, [None] * 4),
        ({"monitor": "worse"}, [None, 2, 4, 6]),
        ({"monitor": "worse", "every_n_epochs": 2}, [None, None, 4, 4]),
    ],
)
def test_last_is_saved_at_every_interval(interval, steps, tmp_path):
    look = Look()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=4,
        limit_train_batches=2,
        limit_val_batches=1,
        callbacks=[look, Checkpoint(**interval)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Watched())
    assert look.found == steps
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 8
