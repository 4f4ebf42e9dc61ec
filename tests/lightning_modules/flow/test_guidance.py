"""Guidance: equivalence across predictions, calls, interval, rescaling, autoguidance (diffusion principles 8.11)."""

import pytest
import torch

from penstock.lightning_modules.flow import grids
from penstock.lightning_modules.flow.guidance import Guided
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.paths import VP, Cosine, Linear
from penstock.lightning_modules.flow.prediction import convert
from penstock.lightning_modules.flow.solvers import Euler

MEANS = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
X = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
COND = torch.tensor([0, 1, 2, 1, 0])


class ClassOracle:
    """Exact predictions for classes that are Gaussians; class 3 is the null condition, their mixture."""

    def __init__(self, kind="velocity", path=None):
        self.kind, self.path, self.batches = kind, path or Linear(), []
        stds = torch.full((3,), 0.4, dtype=torch.float64)
        laws = [Mixture(MEANS[i : i + 1], stds[:1], torch.ones(1, dtype=torch.float64)) for i in range(3)]
        laws.append(Mixture(MEANS, stds, torch.full((3,), 1 / 3, dtype=torch.float64)))
        self.flows = [MixtureFlow(law, path=self.path) for law in laws]

    def drop_condition(self, cond, mask):
        return torch.where(mask, 3, cond)

    def __call__(self, x, t, cond=None):
        self.batches.append(len(x))
        cond = torch.full((len(x),), 3) if cond is None else cond
        velocity = torch.stack([flow.velocity(x, t) for flow in self.flows])[cond, torch.arange(len(x))]
        return convert(velocity, "velocity", self.kind, x, t, self.path)


def full(value):
    return torch.full((5,), value, dtype=torch.float64)


@pytest.mark.parametrize("path", [Linear(), VP(), Cosine()], ids=lambda p: type(p).__name__)
def test_guided_trajectories_agree_in_every_prediction(path):
    grid = grids.uniform(25, 0.02, 0.98)
    ends = []
    for kind in ("velocity", "score", "noise", "data", "v"):
        guided = Guided(ClassOracle(kind, path), COND, 2.5, prediction=kind, path=path)
        ends.append(Euler()(guided, X, grid).x)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-8)


def test_guided_value_is_the_extrapolation():
    net = ClassOracle()
    t = full(0.4)
    expected = (1 - 3.0) * net(X, t, None) + 3.0 * net(X, t, COND)
    torch.testing.assert_close(Guided(net, COND, 3.0)(X, t), expected)
    torch.testing.assert_close(Guided(net, COND, 0.0)(X, t), net(X, t, None))


def test_scale_one_is_one_conditional_call():
    net = ClassOracle()
    guided = Guided(net, COND, 1.0)
    torch.testing.assert_close(guided(X, full(0.4)), ClassOracle()(X, full(0.4), COND))
    assert net.batches == [5]
    assert guided.nfe == 1


def test_guidance_is_one_doubled_batch():
    net = ClassOracle()
    guided = Guided(net, COND, 2.0)
    guided(X, full(0.4))
    assert net.batches == [10]
    assert guided.nfe == 2


def test_unconditional_flow_without_condition():
    net = ClassOracle()
    torch.testing.assert_close(Guided(net, None)(X, full(0.3)), net(X, full(0.3), None))


def test_interval_guides_inside_only_and_saves_calls_outside():
    net = ClassOracle()
    guided = Guided(net, COND, 2.0, interval=(0.3, 0.6))
    torch.testing.assert_close(guided(X, full(0.1)), ClassOracle()(X, full(0.1), COND))
    assert net.batches == [5]
    torch.testing.assert_close(guided(X, full(0.6)), Guided(ClassOracle(), COND, 2.0)(X, full(0.6)))
    mixed = torch.tensor([0.1, 0.4, 0.7, 0.5, 0.2], dtype=torch.float64)
    inside = torch.tensor([False, True, False, True, False])[:, None]
    expected = torch.where(inside, Guided(ClassOracle(), COND, 2.0)(X, mixed), ClassOracle()(X, mixed, COND))
    torch.testing.assert_close(guided(X, mixed), expected)


def test_rescale_matches_the_conditional_spread():
    net = ClassOracle()
    t = full(0.5)
    strong, plain = net(X, t, COND), Guided(net, COND, 3.0)(X, t)
    whole = Guided(net, COND, 3.0, rescale=1.0)(X, t)
    torch.testing.assert_close(whole.std(1), strong.std(1))
    torch.testing.assert_close(Guided(net, COND, 3.0, rescale=0.7)(X, t), 0.7 * whole + 0.3 * plain)


def test_autoguidance_moves_away_from_the_weak_network():
    net = ClassOracle()
    t = full(0.5)
    weak_calls = []

    def weak(x, t, cond):
        weak_calls.append(cond)
        return 0.5 * x

    expected = 0.5 * X + 2.0 * (net(X, t, COND) - 0.5 * X)
    guided = Guided(net, COND, 2.0, weak=weak)
    torch.testing.assert_close(guided(X, t), expected)
    assert torch.equal(weak_calls[0], COND)
    assert guided.nfe == 2


def test_errors():
    with pytest.raises(ValueError, match="needs a condition"):
        Guided(ClassOracle(), None, 2.0)
    with pytest.raises(ValueError, match="rescale"):
        Guided(ClassOracle(), COND, 2.0, rescale=1.5)
