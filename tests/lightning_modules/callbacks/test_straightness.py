"""Straightness of flows in closed form (rectified flow section 8), and the pictures of a run."""

import json

import pytest
import torch
from torch import nn

from penstock.lightning_modules.callbacks.straightness import Straightness, follow, noises
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.rectified_flow import RectifiedFlow


class Gaussian(nn.Module):
    """Exact velocity between N(0, I) and N(0, s^2 I) in the plane: of the first rectified flow, or of the second."""

    shape, num_classes = (2,), 0

    def __init__(self, s, reflowed):
        super().__init__()
        self.s, self.reflowed = s, reflowed

    def forward(self, x, t, cond=None):
        t, s = t[:, None], self.s
        if self.reflowed:
            return (s - 1) * x / (1 - t + t * s)
        return (t * s**2 - (1 - t)) * x / ((1 - t) ** 2 + t**2 * s**2)


@pytest.mark.parametrize(("steps", "expected"), [(10, 0.37918), (100, 0.42374), (1000, 0.42865)])
def test_first_flow_has_the_printed_straightness(steps, expected):
    flow = RectifiedFlow(Gaussian(1.0, False), torch.optim.Adam, eps=1e-6)
    paths = follow(flow, noises(flow, 4000, seed=0), steps)
    scale = paths.states[0].square().sum(1).mean()
    assert float(paths.deviation.mean() / scale) == pytest.approx(expected, rel=1e-3)
    assert paths.states.shape == (steps + 1, 4000, 2)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_second_flow_is_straight(s):
    flow = RectifiedFlow(Gaussian(s, True), torch.optim.Adam, eps=1e-6)
    paths = follow(flow, noises(flow, 100, seed=0), 50)
    assert float(paths.deviation.max()) < 1e-8
    torch.testing.assert_close(paths.states[-1], s * paths.states[0], rtol=1e-4, atol=1e-4)


def test_same_noise_for_both_flows():
    a, b = (noises(RectifiedFlow(Gaussian(1.0, r), torch.optim.Adam), 10, seed=4) for r in (False, True))
    assert torch.equal(a, b)


def test_a_run_leaves_both_pictures(make_teacher, tmp_path, monkeypatch):
    teacher = make_teacher("model.net.width=16", experiment="rectified_flow_points")
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    words = ["data.n=200", "data.steps=2", "data.pairs_batch=100", "data.shard=200", "data.batch_size=50"]
    words += ["model.net.width=16", "callbacks.straightness.n=20", "callbacks.straightness.steps=5"]
    words += ["trainer.max_steps=2", "trainer.max_epochs=-1", "callbacks.samples=null", "logger=csv"]
    assert main(["fit", "experiment=reflow_points", f"teacher={teacher}", *words]) == 0
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert values["straightness"] >= 0
    assert values["straightness/teacher"] > 0
    names = {p.name for p in (tmp_path / "samples").iterdir()}
    assert {"straightness.png", "trajectories.png"} <= names


def test_numbers_out_of_range():
    with pytest.raises(UserError, match=r"Straightness.n: 1 given"):
        Straightness(n=1)


@pytest.mark.slow
def test_the_reflow_of_a_flow_from_data_to_data_is_straighter(tmp_path, monkeypatch):
    short = ["trainer.max_epochs=-1", "trainer.max_steps=300", "trainer.limit_val_batches=0", "trainer.accelerator=cpu"]
    short += ["logger=csv", "callbacks.ema.decay=0.95", "callbacks.straightness.steps=20"]
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "first"))
    assert main(["fit", "experiment=rectified_flow_three_modes", *short, "data.target.batch_size=500"]) == 0
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "second"))
    words = [f"teacher={tmp_path / 'first'}", "data.n=2000", "data.shard=2000", "data.steps=20", "data.batch_size=500"]
    assert main(["fit", "experiment=reflow_three_modes", *short, *words, "model.lr=5e-3"]) == 0
    first, second = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("first", "second"))
    assert second["straightness/teacher"] == pytest.approx(first["straightness"], rel=1e-5)
    assert second["straightness"] < first["straightness"] / 5
    assert (tmp_path / "second" / "samples" / "trajectories.png").is_file()
