"""EMA: formula, golden numbers, what callbacks and files see, resume, compiled, tied, frozen and sharded weights."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import ranks
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn

from penstock.lightning_modules.callbacks.ema import EMA
from penstock.lightning_modules.checkpoints import AtomicCheckpointIO, load_checkpoint, load_weights
from penstock.lightning_modules.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "rectified_flow" / "06_optimizer_ema.safetensors"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class Module(pl.LightningModule):
    def __init__(self, compiled: str = "no", frozen: bool = True, seed: int = 0, steps: int = 4):
        super().__init__()
        torch.manual_seed(seed)
        self.net = Net()
        self.net.first.requires_grad_(not frozen)
        self.steps = steps
        if compiled == "attribute":
            self.net = torch.compile(self.net, backend="eager")
        elif compiled == "in place":
            self.net.compile(backend="eager")

    def loss(self, batch):
        return (self.net(batch) - batch).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(self.train_dataloader().dataset[batch_idx * 6 : batch_idx * 6 + 6])

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self):
        data = torch.randn(self.steps * 6, 4, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.DataLoader(data, batch_size=6)

    val_dataloader = test_dataloader = train_dataloader


def trainer(folder, *callbacks, epochs=2, **options):
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, accelerator="cpu", default_root_dir=folder,
        plugins=[AtomicCheckpointIO()], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options,
    )  # fmt: skip


def keep(folder, **options):
    options = {"every_n_train_steps": 1, "save_top_k": -1} | options
    return ModelCheckpoint(dirpath=folder, filename="{step}", auto_insert_metric_name=False, **options)


class Watch(Callback):
    """Records the raw weights after each step and what every evaluation hook sees."""

    def __init__(self):
        self.raw, self.seen = [], {}

    def on_train_batch_end(self, trainer, module, *_):
        self.raw.append(module.net.last.weight.detach().clone())

    def note(self, hook, module):
        self.seen.setdefault(hook, []).append((len(self.raw), module.net.last.weight.detach().clone()))

    def on_validation_epoch_start(self, trainer, module):
        self.note("start", module)

    def on_validation_batch_end(self, trainer, module, *_):
        self.note("batch", module)

    def on_validation_epoch_end(self, trainer, module):
        self.note("end", module)

    def on_train_batch_start(self, trainer, module, *_):
        self.note("train", module)


def average(start, raw, decay, warmup=True):
    shadows = [start.double()]
    for n, weight in enumerate(raw, 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        shadows.append(d * shadows[-1] + (1 - d) * weight.double())
    return shadows


def test_golden_numbers():
    data = load_file(GOLDEN)
    for which, decay in enumerate(data["in/decays"].tolist()):
        ema = EMA(decay=decay)
        ema._weights = [data[f"in/p{i}"].clone() for i in range(3)]
        ema._shadow = [w.clone() for w in ema._weights]
        for step in range(6):
            for i, weight in enumerate(ema._weights):
                weight.copy_(data[f"out/step{step}_p{i}"])
            ema.update()
            for i, shadow in enumerate(ema._shadow):
                torch.testing.assert_close(shadow, data[f"out/step{step}_ema{which}_p{i}"], atol=1e-14, rtol=0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("decay", "warmup"), [(0.9999, True), (0.3, True), (0.6, False)])
def test_formula_and_what_other_callbacks_see(tmp_path, first, decay, warmup):
    module, watch, ema = Module(), Watch(), EMA(decay, warmup)
    start = module.net.last.weight.detach().clone()
    fit = trainer(tmp_path, *((ema, watch) if first else (watch, ema)), num_sanity_val_steps=1)
    fit.fit(module)
    shadows = average(start, watch.raw, decay, warmup)
    assert ema.updates == len(watch.raw) == 8
    for hook in ("start", "batch", "end"):
        assert [n for n, _ in watch.seen[hook]][:1] == [0]
        for n, weight in watch.seen[hook]:
            torch.testing.assert_close(weight.double(), shadows[n], atol=1e-6, rtol=0)
    for n, weight in watch.seen["train"]:
        assert torch.equal(weight, watch.raw[n - 1] if n else start)
    torch.testing.assert_close(module.net.last.weight.double(), shadows[-1], atol=1e-6, rtol=0)
    last = module.net.last.weight.detach().clone()
    fit.test(module, verbose=False)
    assert torch.equal(module.net.last.weight, last)


def test_accumulation_counts_optimiser_steps(tmp_path):
    ema = EMA()
    trainer(tmp_path, ema, epochs=1, accumulate_grad_batches=2, limit_val_batches=0).fit(Module())
    assert ema.updates == 2


def test_files_hold_the_average_and_the_raw_weights(tmp_path):
    module, watch = Module(), Watch()
    start = module.net.last.weight.detach().clone()
    in_validation = keep(tmp_path / "val", every_n_train_steps=None, monitor="val", save_on_train_epoch_end=False)
    fit = trainer(tmp_path, watch, keep(tmp_path), in_validation, EMA())
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "after.ckpt")
    shadows = average(start, watch.raw, 0.9999)
    files = [(tmp_path / f"{n}.ckpt", n) for n in range(1, 9)]
    files += [(tmp_path / "val" / "4.ckpt", 4), (tmp_path / "val" / "8.ckpt", 8), (tmp_path / "after.ckpt", 8)]
    for path, n in files:
        checkpoint = load_checkpoint(path)
        state, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
        assert state.keys() == raw.keys() == module.state_dict().keys()
        torch.testing.assert_close(state["net.last.weight"].double(), shadows[n], atol=1e-6, rtol=0)
        assert torch.equal(raw["net.last.weight"], watch.raw[n - 1])
        assert torch.equal(state["net.norm.running_mean"], raw["net.norm.running_mean"])
        assert torch.equal(state["net.first.weight"], module.net.first.weight)


@pytest.mark.parametrize("step", [1, 4, 6])
@pytest.mark.parametrize("compiled", ["no", "attribute", "in place"])
def test_resume_gives_the_same_bits(tmp_path, step, compiled):
    whole, ema = Module(compiled), EMA()
    trainer(tmp_path, keep(tmp_path), ema, limit_val_batches=0).fit(whole)
    for key in load_checkpoint(tmp_path / f"{step}.ckpt")["state_dict"]:
        assert "_orig_mod" not in key
    resumed, again = Module(compiled, seed=5), EMA()
    fit = trainer(tmp_path / "again", again, limit_val_batches=0, max_steps=step + 4 - step % 4)
    fit.fit(resumed, ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
    expected = load_checkpoint(tmp_path / f"{step + 4 - step % 4}.ckpt")
    assert again.updates == step + 4 - step % 4
    fit.save_checkpoint(tmp_path / "resumed.ckpt")
    found = load_checkpoint(tmp_path / "resumed.ckpt")
    for part in ("state_dict", "current_model_state"):
        for key, value in expected[part].items():
            assert torch.equal(found[part][key], value), (part, key)


def test_a_second_fit_goes_on_from_the_raw_weights(tmp_path):
    whole, halves = Module(), Module()
    for module in (whole, halves):
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=0.1)
    trainer(tmp_path, EMA(), limit_val_batches=0).fit(whole)
    ema = EMA()
    fit = trainer(tmp_path, ema, epochs=1, limit_val_batches=0)
    fit.fit(halves)
    fit.fit_loop.max_epochs = 2
    fit.fit(halves)
    assert ema.updates == 8
    assert torch.equal(whole.net.last.weight, halves.net.last.weight)
    other = Module(seed=3)
    fit = trainer(tmp_path, ema, epochs=1, limit_val_batches=0)
    fit.fit(other)
    assert ema.updates == 4


@pytest.mark.parametrize("first", [True, False])
def test_unfreezing_and_tied_weights(tmp_path, first):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.net.first.requires_grad_(True)
                module.net.last.requires_grad_(False)

    module = Module()
    module.twin = module.net.last
    trainer(
        tmp_path,
        *((Unfreeze(), EMA()) if first else (EMA(), Unfreeze())),
        keep(tmp_path),
        limit_val_batches=0,
        epochs=3,
    ).fit(module)
    before, after = load_checkpoint(tmp_path / "4.ckpt"), load_checkpoint(tmp_path / "12.ckpt")
    for checkpoint in (before, after):
        state, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
        assert torch.equal(state["twin.weight"], state["net.last.weight"])
        assert not torch.equal(state["net.last.weight"], raw["net.last.weight"])
    assert torch.equal(before["state_dict"]["net.first.weight"], before["current_model_state"]["net.first.weight"])
    assert not torch.equal(after["state_dict"]["net.first.weight"], after["current_model_state"]["net.first.weight"])


def test_checkpoint_without_average_starts_one(tmp_path):
    trainer(tmp_path, keep(tmp_path), limit_val_batches=0).fit(Module())
    ema = EMA()
    with pytest.warns(UserWarning, match="holds no 'current_model_state'; the average starts from its weights"):
        trainer(tmp_path, ema, limit_val_batches=0, epochs=2).fit(Module(seed=5), ckpt_path=tmp_path / "4.ckpt")
    assert ema.updates == 4


def test_sampling_uses_the_average(tmp_path):
    trainer(tmp_path, EMA(), keep(tmp_path), limit_val_batches=0).fit(module := Module())
    fresh = Module(seed=9)
    load_weights(fresh, tmp_path / "8.ckpt")
    assert torch.equal(fresh.net.last.weight, module.net.last.weight)
    tested = Module("attribute", seed=9)
    trainer(tmp_path, EMA()).test(tested, ckpt_path=tmp_path / "8.ckpt", verbose=False)
    assert torch.equal(tested.net.last.weight, module.net.last.weight)


def test_bad_settings(tmp_path):
    for decay in (-0.1, 1.0):
        with pytest.raises(UserError, match=rf"EMA: decay {decay}, expected a number in \[0, 1\)"):
            EMA(decay)
    with pytest.raises(UserError, match="EMA: start -1, expected 0 or more"):
        EMA(start=-1)
    with pytest.raises(UserError, match=r"save_weights_only is true and would write raw weights, expected false"):
        trainer(tmp_path, EMA(), keep(tmp_path, save_weights_only=True)).fit(Module())
    stub = type("Stub", (), {"checkpoint_callbacks": ()})()
    for strategy, message in (
        (ModelParallelStrategy(), r"save_distributed_checkpoint is true, expected false"),
        (FSDPStrategy(state_dict_type="sharded"), "state_dict_type 'sharded', expected 'full'"),
    ):
        stub.strategy = strategy
        with pytest.raises(UserError, match=message):
            EMA().setup(stub, Module(), "fit")


@pytest.mark.slow
def test_sharded_over_two_ranks(tmp_path):
    with ranks.running(Path(__file__).with_name("sharded_ema.py"), tmp_path):
        pass
    plain, sharded = (load_checkpoint(tmp_path / f"{kind}.ckpt") for kind in ("plain", "fsdp2"))
    assert sharded["callbacks"] == plain["callbacks"]
    for part in ("state_dict", "current_model_state"):
        assert sharded[part].keys() == plain[part].keys()
        for key, value in plain[part].items():
            torch.testing.assert_close(sharded[part][key], value, atol=1e-6, rtol=1e-5)
