"""FiniteGuard: every rank stops at the same step, names step, rank, samples, last good file; nothing is saved after."""

import math
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import ranks
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from penstock.lightning_modules.callbacks.finite import FiniteGuard
from penstock.lightning_modules.checkpoints import AtomicCheckpointIO, load_checkpoint
from penstock.lightning_modules.errors import UserError


class Points(torch.utils.data.Dataset):
    """Twenty-four points; sample `bad`, if any, holds a NaN."""

    def __init__(self, bad: int | None = None):
        self.data = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
        if bad is not None:
            self.data[bad, 1] = math.nan

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return {"points": self.data[i], "index": i}


class Module(pl.LightningModule):
    def __init__(self, bad: int | None = None, explode_at: int | None = None, gradient_at: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.bad, self.explode_at, self.gradient_at = bad, explode_at, gradient_at

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch["points"]) - batch["points"]).square().mean()
        if self.global_step == self.explode_at:
            loss = loss / 0
        if self.global_step == self.gradient_at:
            loss = loss + (self.layer.weight - self.layer.weight.detach()).square().sum().sqrt()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        data = Points(self.bad)
        sampler = DistributedSampler(data, shuffle=False) if self.trainer.world_size > 1 else None
        return torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)


def fit(folder, module, guard, *callbacks, **options):
    keep = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )
    options = {"devices": 1, "max_epochs": 1} | options
    trainer = pl.Trainer(
        callbacks=[guard, *callbacks, keep], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO()], default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module)


def test_nan_sample_stops_before_the_step(tmp_path):
    module = Module(bad=14)
    with pytest.raises(UserError) as error:
        fit(tmp_path, module, FiniteGuard(), OnExceptionCheckpoint(tmp_path, "exception"))
    assert str(error.value) == (
        "loss is not finite at step 3 of epoch 0: nan on rank 0 in the batch of samples 12, 13, 14, 15 "
        "('points' is not finite in 1 of them, first 14); expected a finite number; last good checkpoint "
        f"'{tmp_path}/3.ckpt'"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ckpt", "2.ckpt", "3.ckpt"]
    good = load_checkpoint(tmp_path / "3.ckpt")["state_dict"]["layer.weight"]
    assert torch.equal(module.layer.weight, good)
    assert module.layer.weight.isfinite().all()


def test_infinite_loss_in_the_first_step_without_index(tmp_path):
    module = Module(explode_at=0)
    module.train_dataloader = lambda: torch.utils.data.DataLoader([{"points": torch.ones(4)}])
    expected = (
        "loss is not finite at step 0 of epoch 0: inf on rank 0; expected a finite number; no checkpoint was saved"
    )
    with pytest.raises(UserError, match=expected):
        fit(tmp_path, module, FiniteGuard())


def test_long_batches_are_cut_in_the_message(tmp_path):
    module = Module(explode_at=0)
    module.train_dataloader = lambda: torch.utils.data.DataLoader(Points(), batch_size=24)
    with pytest.raises(UserError, match=r"samples 0, 1, .*, 15 and 8 more; expected"):
        fit(tmp_path, module, FiniteGuard())


def test_gradient_norm(tmp_path):
    with pytest.raises(
        UserError, match=r"gradient norm is not finite at step 2 of epoch 0: nan on rank 0 in the batch"
    ):
        fit(tmp_path, module := Module(gradient_at=2), FiniteGuard(gradients=True))
    assert torch.equal(module.layer.weight, load_checkpoint(tmp_path / "2.ckpt")["state_dict"]["layer.weight"])
    with pytest.raises(UserError, match="loss is not finite at step 3"):
        fit(tmp_path, Module(gradient_at=2), FiniteGuard())
    guard = FiniteGuard(gradients=True)
    trainer = type("Stub", (), {"precision": "16-mixed"})()
    with pytest.raises(UserError, match="gradients is true with precision '16-mixed', expected bf16-mixed or 32-true"):
        guard.setup(trainer, None, "fit")


@pytest.mark.parametrize("gradients", [False, True])
def test_late_reading_as_on_cuda_never_saves_a_bad_step(tmp_path, monkeypatch, gradients):
    monkeypatch.setattr(FiniteGuard, "_lags", staticmethod(lambda value: True))
    with pytest.raises(UserError, match="step 3 of epoch 0: nan on rank 0 in the batch of samples 12, 13, 14, 15"):
        fit(tmp_path, Module(bad=14), FiniteGuard(gradients), OnExceptionCheckpoint(tmp_path, "exception"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.ckpt", "2.ckpt", "3.ckpt"]


def test_late_reading_at_the_next_batch_and_at_the_end_of_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(FiniteGuard, "_lags", staticmethod(lambda value: True))
    steps = []

    class Module2(Module):
        def on_train_batch_end(self, *_):
            steps.append(self.global_step)

    for bad, seen in ((14, [1, 2, 3, 4]), (22, [1, 2, 3, 4, 5, 6])):
        steps.clear()
        trainer = pl.Trainer(
            callbacks=[FiniteGuard()], logger=False, accelerator="cpu", enable_progress_bar=False, max_epochs=3,
            enable_model_summary=False, enable_checkpointing=False, devices=1,
        )  # fmt: skip
        with pytest.raises(UserError, match=f"step {bad // 4} of epoch 0"):
            trainer.fit(Module2(bad=bad))
        assert steps == seen


def test_a_healthy_run_is_left_alone(tmp_path):
    guarded, plain = Module(), Module()
    fit(tmp_path, guarded, FiniteGuard(gradients=True), accumulate_grad_batches=2, max_epochs=2)
    fit(tmp_path, plain, ModelCheckpoint(tmp_path / "x"), accumulate_grad_batches=2, max_epochs=2)
    assert torch.equal(guarded.layer.weight, plain.layer.weight)


@pytest.mark.slow
def test_nan_on_rank_1_stops_both_ranks_at_the_same_step(tmp_path):
    with ranks.running(__file__, tmp_path):
        pass
    expected = (
        "loss is not finite at step 1 of epoch 0: nan on rank 1 in the batch of samples 9, 11, 13, 15 ('points' is not "
        f"finite in 1 of them, first 13); expected a finite number; last good checkpoint '{tmp_path}/1.ckpt'"
    )
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}.txt").read_text() == expected
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["1.ckpt"]


if __name__ == "__main__":
    module, folder = Module(bad=13), Path(sys.argv[1])
    try:
        fit(folder, module, FiniteGuard(), OnExceptionCheckpoint(folder, "exception"), devices=2, strategy="ddp")
    except UserError as error:
        (folder / f"rank{module.global_rank}.txt").write_text(str(error))
