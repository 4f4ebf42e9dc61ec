"""The BOSS module: official losses, segments, the schedule in the checkpoint, LoRA, whole runs."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from penstock.datamodules.points import THREE_MODES
from penstock.kernels.philox import Draws
from penstock.lightning_modules.boss import BOSS
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.bellman import cost_matrix, schedules, straightening_loss, uniform_indices
from penstock.lightning_modules.flow.grids import compressed, uniform
from penstock.lightning_modules.flow.losses import SquaredError
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.solvers import Euler
from penstock.lightning_modules.flow.times import Fixed, Grid, Uniform
from penstock.lightning_modules.nets import lora
from penstock.lightning_modules.nets.mlp import MLP
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.rectified_flow import RectifiedFlow
from penstock.lightning_modules.weights.rectified_flow import convert, invert

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "boss" / "03_losses.safetensors"
ADAM = partial(torch.optim.Adam, lr=1e-3)
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def golden():
    tensors = load_file(GOLDEN)
    net = NCSNpp(shape=(3, 8, 8), width=8, mult=(1, 2), blocks=1, attention=(4,))
    net.load_state_dict(
        convert({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    )
    return net.double(), tensors


@pytest.mark.parametrize(("name", "reduction"), [("redress", "mean"), ("redress_sum", "half_sum")])
def test_official_straightening_loss_and_gradients(name, reduction):
    net, tensors = golden()
    x, y, t, s = (tensors[f"in/{key}"] for key in ("z0", "z1", "t0", "t1"))
    velocity = compressed(net, 1e-3)
    torch.testing.assert_close(velocity(x, t), tensors["out/wrapped_v"], **EXACT)
    losses = straightening_loss(velocity, x, y, t, s, reduction)
    torch.testing.assert_close(losses, tensors[f"out/{name}/per_sample"], **EXACT)
    torch.testing.assert_close(losses.mean(), tensors[f"out/{name}/loss"], **EXACT)
    losses.mean().backward()
    grads = invert({key: p.grad for key, p in net.named_parameters()})
    expected = {k.rpartition("grad/")[2]: v for k, v in tensors.items() if k.startswith(f"out/{name}/grad/")}
    assert len(expected) == (3 if name == "redress" else 0)
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, **EXACT)


@pytest.mark.parametrize("row", range(5))
def test_the_module_has_the_official_loss(row):
    """One segment whose ends are times of the schedule."""
    net, tensors = golden()
    ends = sorted({0.0, tensors["in/t0"][row].item(), tensors["in/t1"][row].item(), 1.0})
    flow, r = BOSS(net, ADAM, k=len(ends) - 1).double(), ends.index(tensors["in/t0"][row].item())
    flow.grid = torch.tensor(ends, dtype=torch.float64)
    states = torch.randn(1, len(ends), 3, 8, 8, dtype=torch.float64)
    states[0, r], states[0, r + 1] = tensors["in/z0"][row], tensors["in/z1"][row]
    draws = SimpleNamespace(uniform=lambda name: torch.tensor([(r + 0.5) / flow.k]))
    loss = flow.losses({"states": states}, draws)
    torch.testing.assert_close(loss[0], tensors["out/redress/per_sample"][row], **EXACT)


@pytest.mark.parametrize("name", ["reflow_uniform", "reflow_t0", "reflow_k"])
def test_official_losses_of_the_baselines(name):
    net, tensors = golden()
    u, k = tensors["in/u"], int(tensors["in/k"])
    times = {"reflow_uniform": Uniform(1e-3), "reflow_t0": Fixed(1e-3), "reflow_k": Grid(k, 1e-3)}[name]
    u = (tensors["in/j"].double() + 0.5) / k if name == "reflow_k" else u
    flow = RectifiedFlow(net, ADAM, times=times, loss=SquaredError())
    draws = SimpleNamespace(uniform=lambda name, shape: u[:, None].expand(-1, *shape))
    losses = flow.losses({"image": tensors["in/z1"], "source": tensors["in/z0"]}, draws)
    torch.testing.assert_close(losses, tensors[f"out/{name}/per_sample"], **EXACT)
    torch.testing.assert_close(losses.mean(), tensors[f"out/{name}/loss"], **EXACT)


def flow_of(k=3, **options):
    torch.manual_seed(0)
    net = UNet((1, 4, 4), width=8, mult=(1,), blocks=1, num_classes=3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    flow = BOSS(net, ADAM, k=k, **options).eval()
    flow.grid = torch.tensor([0.0, 0.5, 0.6, 1.0], dtype=torch.float64)[: k + 1]
    return flow


def batch_of(n=600):
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(n) * 7 + 3
    return {"states": torch.randn(n, 4, 1, 4, 4, generator=generator), "label": index % 3, "index": index}


def test_each_sample_draws_one_segment_that_is_its_own():
    flow, batch = flow_of(), batch_of()
    with torch.no_grad():
        losses = flow.losses(batch, Draws(5, 2, batch["index"]))
        half = {key: value[300:] for key, value in batch.items()}
        torch.testing.assert_close(flow.losses(half, Draws(5, 2, half["index"])), losses[300:], rtol=1e-5, atol=1e-6)
        every, grid = [], flow.grid.float()
        for r in range(3):
            t = (1e-3 + (1 - 1e-3) * grid[r]).expand(600)
            target = (batch["states"][:, r + 1] - batch["states"][:, r]) / (grid[r + 1] - grid[r])
            every.append((flow.net(batch["states"][:, r], t, batch["label"]) - target).square().flatten(1).mean(1))
    hits = torch.stack([torch.isclose(losses, one, rtol=1e-4) for one in every])
    assert bool((hits.sum(0) == 1).all())
    assert bool(((hits.float().mean(1) - 1 / 3).abs() < 0.08).all())
    logged = {}
    flow.log_dict, flow._trainer = lambda values, **options: logged.update(values), SimpleNamespace(world_size=1)
    with torch.no_grad():
        flow.validation_step(batch, 0)
    means = torch.stack(every).mean(1)
    torch.testing.assert_close(
        logged, {"val/loss": means.mean()} | {f"val/loss_interval_{r}": means[r] for r in range(3)}
    )


def test_its_own_steps_unless_others_are_asked_for():
    flow = flow_of()
    draw = partial(flow.sample, 2, cond=torch.arange(2))

    def sample(**options):
        with torch.no_grad():
            return draw(generator=torch.Generator().manual_seed(0), **options)

    own = sample()
    assert flow.nfe == 3
    assert torch.equal(own, sample(steps=3))
    assert torch.equal(own, sample(grid=flow.grid))
    assert not torch.allclose(own, sample(grid=uniform(3)))
    assert torch.equal(sample(steps=5), sample(grid=uniform(5)))
    sample(steps="bellman:2/8")
    assert flow.nfe == 2
    index = torch.arange(2)
    flow.predict_step({"index": index, "label": index}, 0)
    assert flow.nfe == 3


def test_the_schedule_is_in_the_state():
    flow, other = flow_of(), flow_of()
    other.grid = uniform(3)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.grid, flow.grid)
    assert other.grid.dtype == torch.float64


def fake_trainer(flow, **data):
    module = SimpleNamespace(shape=(1, 4, 4), num_classes=3, **data)
    flow._trainer = SimpleNamespace(datamodule=module, fast_dev_run=False, global_rank=0)
    return flow


def test_data_that_do_not_fit():
    with pytest.raises(
        UserError, match="holds no states of a teacher's trajectory; expected pairs with keep=bellman:K"
    ):
        fake_trainer(flow_of()).setup("fit")
    with pytest.raises(UserError, match=r"model\.k: found 3, expected 4"):
        fake_trainer(flow_of(), times=uniform(4).tolist()).setup("fit")
    with pytest.raises(UserError, match=r"data.keep: states at the times \[0.0, 0.3333, .* those of the checkpoint"):
        fake_trainer(flow_of(), times=uniform(3).tolist()).on_validation_start()
    flow = fake_trainer(flow_of(), times=[0.0, 0.25, 0.75, 1.0])
    flow.setup("fit")
    assert flow.grid.tolist() == [0.0, 0.25, 0.75, 1.0]
    with pytest.raises(ValueError, match="k=0"):
        BOSS(MLP((2,)), ADAM, k=0)


class Corrected(nn.Module):
    """The exact flow of the three modes plus a small network that begins at 0: a student that starts as its teacher."""

    shape, num_classes = (2,), 0

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.mlp = teacher, MLP((2,), width=128, depth=3, activation="silu", fourier=16)
        with torch.no_grad():
            self.mlp.stem.weight[:, :2] *= 10
        nn.init.zeros_(self.mlp.body[-1].weight)
        nn.init.zeros_(self.mlp.body[-1].bias)

    def forward(self, x, t, cond=None):
        return self.teacher(x, t) + self.mlp(x, t)


@pytest.mark.slow
def test_a_tuned_student_ends_nearer_to_its_teacher():
    """Four steps on the three modes; chords of the best schedule are easier to learn than those of equal steps."""
    means, grid = torch.from_numpy(THREE_MODES).float(), uniform(100)
    flow = MixtureFlow(Mixture.uniform(means, 0.3**0.5), Mixture.uniform(-means, 0.3**0.5))
    found = schedules(cost_matrix(flow.velocity, flow.source.sample(200, torch.Generator().manual_seed(0)), grid))
    losses, distances = {}, {}
    for name, kept in {"bellman": found.path(4), "equal": uniform_indices(4, 100)}.items():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        x0 = flow.source.sample(4096, generator)
        states = Euler()(flow.velocity, x0, grid, trajectory=True).trajectory[kept].transpose(0, 1)
        student = BOSS(Corrected(flow.velocity), ADAM, k=4, key="points")
        student.grid = grid[kept]
        optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 400)
        distances[name] = [(student.decode(x0).detach() - states[:, -1]).square().sum(1).mean().sqrt().item()]
        for step in range(400):
            index = torch.randint(4096, (512,), generator=generator)
            loss = student.losses({"states": states[index]}, Draws(0, step, index)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        index = torch.arange(4096)
        losses[name] = student.losses({"states": states}, Draws(1, 0, index)).mean().item()
        distances[name].append((student.decode(x0).detach() - states[:, -1]).square().sum(1).mean().sqrt().item())
    assert student.nfe == 4
    assert losses["bellman"] < 0.7 * losses["equal"]
    assert distances["bellman"][0] > 3
    assert distances["bellman"][1] < 0.85 * distances["bellman"][0]


# ---------------------------------------------------------------------- LoRA


def test_lora_trains_its_own_parts_only_and_starts_from_plain_weights():
    plain = flow_of()
    flow = flow_of(lora_rank=2)
    state = {f"net.{key}": value for key, value in plain.net.state_dict().items()} | {"grid": plain.grid}
    flow.net.load_state_dict(flow.initial_weights(state))
    batch = batch_of(20)
    with torch.no_grad():
        expected = plain.losses(batch, Draws(0, 0, batch["index"]))
    losses = flow.losses(batch, Draws(0, 0, batch["index"]))
    assert torch.equal(losses.detach(), expected)
    losses.mean().backward()
    trained = {name for name, p in flow.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in flow.named_parameters() if "lora_" in name}
    optimizer = flow.configure_optimizers()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)


# ---------------------------------------------------------------------- whole runs

TINY = ["logger=csv", "model.net.width=8", "callbacks.metrics=null", "callbacks.samples.rows=1", "seed_everything=1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    patch = pytest.MonkeyPatch()
    patch.setenv("RUN_DIR", str(folder))
    words = ["experiment=rectified_flow_digits", *TINY, "trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    assert main(["fit", *words, "callbacks.samples=null"]) == 0
    patch.undo()
    return folder


def fit(teacher, folder, monkeypatch, *words):
    monkeypatch.setenv("RUN_DIR", str(folder))
    data = ["data.n=60", "data.steps=10", "data.pairs_batch=20", "data.shard=40", "data.batch_size=20"]
    code = main(["fit", "experiment=boss_digits", f"teacher={teacher}", *TINY, *data, *words])
    return code


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_run_resume_and_sample(teacher, tmp_path, monkeypatch, rank):
    words = [f"model.lora_rank={rank}", "trainer.check_val_every_n_epoch=1"]
    assert fit(teacher, tmp_path / "whole", monkeypatch, *words, "trainer.max_epochs=4") == 0
    assert fit(teacher, tmp_path / "cut", monkeypatch, *words, "trainer.max_epochs=2") == 0
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "cut"))
    assert main(["fit", f"ckpt_path={last}", "trainer.max_epochs=4"]) == 0
    whole, cut = (load_checkpoint(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "cut"))
    for part in ("state_dict", "current_model_state"):
        assert whole[part].keys() == cut[part].keys()
        assert all(torch.equal(value, cut[part][key]) for key, value in whole[part].items())
    names = {name for name in whole["state_dict"] if not torch.equal(*(whole[p][name] for p in PARTS))}
    assert names
    if rank:
        assert all("lora_" in name for name in names)
        started = load_checkpoint(teacher / "checkpoints/last.ckpt")["current_model_state"]
        for name, value in whole["state_dict"].items():
            if name.endswith(lora.ORIGINAL):
                assert torch.equal(value, started[name.replace(lora.ORIGINAL, ".weight")])
    model = model_from_checkpoint(tmp_path / "whole" / "checkpoints/last.ckpt")
    grid = whole["state_dict"]["grid"]
    assert torch.equal(model.grid, grid)
    assert len(grid) == 5
    for name in ("cost_matrix", "step_sizes", "test"):
        assert (tmp_path / "whole" / "samples" / f"{name}.png").stat().st_size > 500
    assert main(["sample", f"ckpt_path={last}", "n=2"]) == 0
    report = json.loads((tmp_path / "cut/samples/sample_4_steps/report.json").read_text())
    assert report["network_calls"] == 4
    values = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    intervals = [values[f"val/loss_interval_{r}"] for r in range(4)]
    assert sum(intervals) / 4 == pytest.approx(values["val/loss"], rel=1e-5)


PARTS = ("state_dict", "current_model_state")


def test_another_schedule_is_refused_in_one_line(teacher, tmp_path, monkeypatch, capsys):
    assert fit(teacher, tmp_path / "run", monkeypatch, "model.k=3", "trainer.max_epochs=1") == 0
    capsys.readouterr()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    assert main(["fit", f"ckpt_path={last}", "data.keep=[0,1,2,10]", "trainer.max_epochs=2"]) == 2
    assert "data.keep: states at the times [0.0, 0.1, 0.2, 1.0], expected" in capsys.readouterr().err
    assert fit(teacher, tmp_path / "other", monkeypatch, "data.keep=bellman:2") == 2
    assert "model.k: found 4, expected 2" in capsys.readouterr().err
    assert fit(teacher, tmp_path / "other", monkeypatch, "data.keep=bellman:11", "model.k=11") == 2
    assert "found K=11, expected 1 to 10" in capsys.readouterr().err
