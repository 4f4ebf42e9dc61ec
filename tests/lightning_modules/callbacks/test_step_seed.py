"""StepSeed: dropout of a resumed run equals that of one never stopped; ranks, steps and seeds differ; it is cheap."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from penstock.lightning_modules.callbacks.step_seed import StepSeed, step_seed
from penstock.lightning_modules.checkpoints import AtomicCheckpointIO
from penstock.lightning_modules.errors import UserError


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)
        self.masks = []

    def training_step(self, batch, batch_idx):
        mask = nn.functional.dropout(torch.ones(8), 0.5)
        self.masks.append(mask)
        return (self.layer(batch * mask) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 8))


def fit(folder, module, epochs, ckpt_path=None, seed=7):
    keep = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer = pl.Trainer(
        callbacks=[StepSeed(seed), keep], logger=False, accelerator="cpu", enable_progress_bar=False,
        max_epochs=epochs, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return torch.stack(module.masks)


@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_resumed_run_drops_the_same_activations(tmp_path, step):
    whole, resumed = Module(), Module()
    masks = fit(tmp_path, whole, 2)
    torch.rand(step)
    assert torch.equal(fit(tmp_path / "again", resumed, 2, tmp_path / f"{step}.ckpt"), masks[step:])
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_steps_and_seeds_differ(tmp_path):
    masks = fit(tmp_path / "a", Module(), 2)
    assert len(masks.unique(dim=0)) == 8
    assert not torch.equal(masks, fit(tmp_path / "b", Module(), 2, seed=8))


def test_seeds_do_not_collide():
    seeds = {step_seed(s, n, r) for s in (0, 1, 2**64 - 1) for n in range(200) for r in range(8)}
    assert len(seeds) == 3 * 200 * 8
    assert all(0 <= s < 2**63 for s in seeds)


def test_bad_seed():
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=rf"StepSeed: seed {seed}, expected an integer in \[0, 2\^64\)"):
            StepSeed(seed)
