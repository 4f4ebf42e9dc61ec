"""Straightness of flows in closed form (rectified flow section 8), and the pictures of a run."""

import json

import pytest
import torch
from torch import nn

from penstock.lightning_modules.callbacks.straightness import Straightness, follow
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
    paths = follow(RectifiedFlow(Gaussian(1.0, False), torch.optim.Adam, eps=1e-6), 4000, steps, seed=0)
    scale = paths.states[0].square().sum(1).mean()
    assert float(paths.deviation.mean() / scale) == pytest.approx(expected, rel=1e-3)
    assert paths.states.shape == (steps + 1, 4000, 2)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_second_flow_is_straight(s):
    paths = follow(RectifiedFlow(Gaussian(s, True), torch.optim.Adam, eps=1e-6), 100, 50, seed=0)
    assert float(paths.deviation.max()) < 1e-8
    torch.testing.assert_close(paths.states[-1], s * paths.states[0], rtol=1e-4, atol=1e-4)


def test_same_noise_for_both_flows():
    a, b = (follow(RectifiedFlow(Gaussian(1.0, r), torch.optim.Adam), 10, 3, seed=4) for r in (False, True))
    assert torch.equal(a.states[0], b.states[0])


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
