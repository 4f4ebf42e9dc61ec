"""Two gloo ranks: EMA under FSDP2 through Lightning against one plain process; under FSDP by hand. See test_ema.py."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from penstock.lightning_modules.callbacks.ema import EMA
from penstock.lightning_modules.callbacks.finite import FiniteGuard
from penstock.lightning_modules.checkpoints import AtomicCheckpointIO, load_checkpoint


class Module(pl.LightningModule):
    """Odd sizes, so that shards differ; the whole batch on every rank, so that one process is the reference."""

    def __init__(self, seed: int = 0, ranks: int = 1):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
        self.net[0].bias.requires_grad_(False)
        self.losses, self.ranks = [], ranks

    def configure_model(self):
        if dist.is_initialized() and not hasattr(self, "sharded"):
            self.sharded = True
            fully_shard(self.net[2], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x = torch.linspace(-1, 1, 30).view(6, 5) * (batch_idx + 1)
        return (self.net(x) - x).square().mean()

    def validation_step(self, batch, batch_idx):
        self.losses.append(self.training_step(batch, batch_idx).item())

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4 * self.ranks))

    val_dataloader = train_dataloader


def trainer(folder, ema, epochs, **options):
    return pl.Trainer(
        max_epochs=epochs, callbacks=[ema, FiniteGuard(gradients=True)],
        logger=False, accelerator="cpu", default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, val_check_interval=2,
        plugins=[AtomicCheckpointIO()], num_sanity_val_steps=1, **options,
    )  # fmt: skip


def lightning_fsdp2(folder, ranks):
    """Weights sharded over `ranks` of the two processes."""

    def strategy():
        return ModelParallelStrategy(ranks, 2 // ranks, save_distributed_checkpoint=False)

    module = Module(ranks=ranks)
    fit = trainer(folder, EMA(), 2, strategy=strategy(), devices=2)
    fit.fit(module)
    fit.save_checkpoint(folder / "fsdp2.ckpt")
    half = trainer(folder, EMA(), 1, strategy=strategy(), devices=2)
    half.fit(Module(ranks=ranks))
    half.save_checkpoint(folder / "half.ckpt")
    resumed = trainer(folder, EMA(), 2, strategy=strategy(), devices=2)
    again = Module(seed=3, ranks=ranks)
    resumed.fit(again, ckpt_path=folder / "half.ckpt", weights_only=True)
    resumed.save_checkpoint(folder / "resumed.ckpt")
    dist.barrier()
    found, expected = load_checkpoint(folder / "resumed.ckpt"), load_checkpoint(folder / "fsdp2.ckpt")
    assert found["callbacks"] == expected["callbacks"]
    for part in ("state_dict", "current_model_state"):
        for key, value in expected[part].items():
            assert torch.equal(found[part][key], value), (part, key)
    assert again.losses[-4:] == module.losses[-4:]
    return module.losses


def by_hand_fsdp(plain_losses):
    """The classic wrapper, which Lightning allows on GPUs only: validation after each step sees the average."""
    module = Module()
    root = FullyShardedDataParallel(
        module, auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), use_orig_params=True, device_id=torch.device("cpu")
    )
    fit = SimpleNamespace(
        strategy=SimpleNamespace(model=root), state=SimpleNamespace(fn="fit"), lightning_module=module
    )
    optimizer = torch.optim.Adam([p for p in root.parameters() if p.requires_grad], lr=0.05)
    ema, losses = EMA(), []
    ema.on_fit_start(fit, module)

    def loss(step):
        x = torch.linspace(-1, 1, 30).view(6, 5) * (step + 1)
        return (root(x) - x).square().mean()

    module.forward = module.net.forward

    def validate(steps):
        ema.on_validation_start(fit, module)
        with torch.no_grad():
            losses.extend(loss(step).item() for step in steps)
        ema.on_validation_end(fit, module)

    validate([0])
    for _ in range(2):
        for step in range(4):
            ema.on_train_batch_start(fit, module, None, step)
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
            ema.update()
            if step % 2:
                validate(range(4))
    torch.testing.assert_close(losses, plain_losses, atol=1e-5, rtol=1e-5)


def main(folder):
    module = Module()
    if os.environ["RANK"] == "0":
        environment = {k: os.environ.pop(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")}
        plain = trainer(folder, EMA(), 2, devices=1)
        plain.fit(module)
        plain.save_checkpoint(folder / "plain.ckpt")
        os.environ |= environment
    for ranks in (1, 2):
        losses = lightning_fsdp2(folder, ranks)
        if dist.get_rank() == 0:
            torch.testing.assert_close(losses, module.losses, atol=1e-5, rtol=1e-5)
    by_hand_fsdp(losses)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
