"""FullyShard: two gloo ranks against one plain process, through the command line; checkpoints go both ways."""

import importlib.util
import json
from pathlib import Path
from types import MethodType

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.tiny import tiny_backbone
from penstock.lightning_modules.nets.unet import AttentionBlock, ResidualBlock, UNet
from penstock.lightning_modules.rectified_flow import RectifiedFlow
from penstock.lightning_modules.strategies import FullyShard
from penstock.lightning_modules.trained_parts import blocks, networks

FOLDER = Path(__file__).resolve().parents[1] / "reliability"
TINY = ["experiment=rectified_flow_digits", "data.val_fraction=0.95", "data.batch_size=20", "data.eval_batch_size=40"]
TINY += ["model.net.width=8", "perf=default", "logger=csv", "callbacks.ema.decay=0.9"]
TINY += ["callbacks.metrics.n=20", "callbacks.metrics.steps=[1]", "callbacks.samples.rows=1"]
TINY += ["callbacks.samples.steps=1", "trainer.check_val_every_n_epoch=1", "trainer.limit_val_batches=2"]
TINY += ["trainer.limit_test_batches=1", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"]
TINY += ["callbacks.checkpoint.every_n_epochs=1", "trainer.max_epochs=2", "callbacks.finite.gradients=true"]


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


harness = load("harness")
SHARDED = [*TINY, "strategy=fsdp", "trainer.devices=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`plain`: one process. On two ranks: `sharded`, `half` and then `resumed` from it, `bf16`, `from_plain`."""
    folder = tmp_path_factory.mktemp("runs")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("PENSTOCK_CACHE", str(folder / "cache"))
    names = ("plain", "half_plain", "sharded", "half", "bf16", "from_plain", "on_one_rank")
    found = {name: folder / name for name in names}
    assert harness.penstock("fit", *TINY, run=found["plain"]).code == 0
    assert harness.penstock("fit", *TINY, "trainer.max_epochs=1", run=found["half_plain"]).code == 0

    def job(name, *words):
        return {"words": [*SHARDED, *words], "run": str(found[name])}

    going_on = {"words": [harness.last_checkpoint(found["half"]), "trainer.max_epochs=2"], "run": str(found["half"])}
    jobs = [job("sharded"), job("half", "trainer.max_epochs=1"), going_on]
    jobs += [job("from_plain", harness.last_checkpoint(found["half_plain"]))]
    jobs += [
        job("bf16", "trainer.strategy.gather=bfloat16", "trainer.precision=bf16-mixed", "perf=activation_checkpointing")
    ]
    jobs += [job("bf16", "trainer.strategy.gather=bfloat16")]
    reports = harness.on_ranks(2, jobs, folder / "ranks")
    monkeypatch.undo()
    return found, reports


def losses(run):
    """Of both validations and of the test; the training loss is logged of one rank's share only."""
    rows = harness.metrics(run).values()
    return [float(row[key]) for row in rows for key in ("val/loss", "test/loss") if key in row]


def assert_close(run, other):
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(other)), rtol=1e-5, atol=1e-5)
    found, expected = (load_checkpoint(r / "checkpoints" / "last.ckpt") for r in (run, other))
    for part in ("state_dict", "current_model_state"):
        assert found[part].keys() == expected[part].keys()
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-5)
    for one, two in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
        assert one["state"].keys() == two["state"].keys()
        assert [g["params"] for g in one["param_groups"]] == [g["params"] for g in two["param_groups"]]
        torch.testing.assert_close(one["state"], two["state"], rtol=1e-3, atol=1e-5)


def test_two_ranks_with_shards_train_as_one_without(runs):
    found, reports = runs
    assert [done.code for done in reports[0][:4]] == [0, 0, 0, 0], [done.err[-500:] for done in reports[0]]
    assert_close(found["sharded"], found["plain"])
    assert len(losses(found["plain"])) == 3


def test_resume_on_the_same_ranks_is_exact(runs):
    found, _ = runs
    harness.same_state(found["half"], found["sharded"])
    assert harness.metrics(found["half"]) == harness.metrics(found["sharded"])


def test_resume_across_shards_and_none(runs):
    found, _ = runs
    words = [*TINY, harness.last_checkpoint(found["half_plain"])]
    assert harness.penstock("fit", *words, run=found["on_one_rank"]).code == 0
    assert_close(found["from_plain"], found["on_one_rank"])


def test_a_plain_module_takes_the_file(runs):
    path = runs[0]["sharded"] / "checkpoints" / "last.ckpt"
    saved, model = load_checkpoint(path)["state_dict"], model_from_checkpoint(path)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert type(model.net) is UNet


def test_bfloat16_gathering_needs_mixed_precision(runs):
    found, reports = runs
    assert reports[0][4].code == 0, reports[0][4].err[-800:]
    assert abs(losses(found["bf16"])[-1] - losses(found["plain"])[-1]) < 0.05
    assert {done[5].code for done in reports} == {2}
    assert "strategy.gather: found bfloat16 with trainer.precision=32-true, expected bf16-mixed" in reports[0][5].err


def test_blocks_are_those_the_network_names():
    net = UNet(width=8)
    module = RectifiedFlow(net, torch.optim.Adam)
    module.frozen = nn.Linear(2, 2).requires_grad_(False)
    assert list(networks(module)) == [net]
    found = blocks(net)
    assert {type(block) for block in found} == {ResidualBlock, AttentionBlock}
    assert len(found) == sum(isinstance(m, ResidualBlock | AttentionBlock) for m in net.modules())
    assert list(networks(nn.ModuleList([nn.ModuleList([net])]))) == [net]


def test_weights_outside_any_network_are_refused():
    module = RectifiedFlow(UNet(width=8), torch.optim.Adam)
    module.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match="'scale' of RectifiedFlow belongs to no network"):
        FullyShard()._shard(module)


def test_a_pyramid_in_channels_last_memory_is_sharded(tmp_path):
    """Scalars of its merging, and kernels that do not lie in the order of their axes; one rank, this process."""
    torch.manual_seed(0)
    net = tiny_backbone([32, 64], [64, 32], depth=2).to(memory_format=torch.channels_last)
    image = torch.rand(1, 3, 64, 64)
    expected = [x.detach() for x in net(image)]
    module = LightningModule()
    module.net = net
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        strategy = FullyShard()
        strategy._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        module.configure_model = MethodType(strategy._shard, module)
        module.configure_model()
        found = net(image)
        sum(x.sum() for x in found).backward()
        assert all(isinstance(weight, DTensor) for weight in module.parameters())
        torch.testing.assert_close([x.detach() for x in found], expected)
        assert net.merge.weights[0].grad.full_tensor().shape == (1, 1, 1)
    finally:
        torch.distributed.destroy_process_group()


CLIPS = ["experiment=starflow_v_moving_digits", "trainer.max_steps=4", "data.video.n_train=64"]
CLIPS += ["data.video.n_test=8", "data.video.n_val=8", "data.image.n_train=64", "data.image.batch_size=8"]
CLIPS += ["data.short.n_train=64", "data.short.batch_size=8", "data.short.frames=2"]
CLIPS += ["data.batch_size=8", "frames=4", "model.net.dim=32", "model.optimizer.least=32", "model.denoiser.head_dim=32"]
CLIPS += ["model.net.depths=[1,1]", "model.denoiser.dim=32", "callbacks.metrics=null", "callbacks.anomaly=null"]
CLIPS += ["callbacks.samples.rows=1", "callbacks.samples.cols=2", "callbacks.ema.decay=0.9", "logger=csv"]
CLIPS += ["trainer.accelerator=cpu"]


@pytest.mark.slow
def test_a_video_flow_and_its_denoiser_train_and_sample_alike_on_two_ranks(tmp_path, monkeypatch):
    """The denoiser's gradient comes out of the flow's backward pass, whose weights are gathered block by block."""
    ways = {"sharded": ["strategy=fsdp"], "copied": ["strategy=ddp", "perf=activation_checkpointing"]}
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    assert harness.penstock("fit", *CLIPS, run=tmp_path / "one").code == 0
    jobs = [
        {"words": [*CLIPS, *words, "trainer.devices=2"], "run": str(tmp_path / name)} for name, words in ways.items()
    ]
    reports = harness.on_ranks(2, jobs, tmp_path / "ranks")
    assert all(done.code == 0 for report in reports for done in report), reports
    expected = json.loads((tmp_path / "one" / "metrics.json").read_text())
    for name in ways:
        found = json.loads((tmp_path / name / "metrics.json").read_text())
        for key in ("test/loss", "denoised_mse", "noisy_mse"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4)
        assert (tmp_path / name / "samples" / "test.gif").is_file()
