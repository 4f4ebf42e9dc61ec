"""Losses: reductions, distillation times, symmetry, and the minimiser."""

import pytest
import torch

from penstock.lightning_modules.flow.losses import flow_matching_loss, squared_error
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.paths import VP, Linear
from penstock.lightning_modules.flow.times import Fixed, Grid


def pair(n=4):
    gen = torch.Generator().manual_seed(0)
    return torch.randn(2, n, 3, 4, 4, dtype=torch.float64, generator=gen)


def test_reductions():
    x0, x1 = pair()
    difference = x1 - x0
    assert torch.allclose(squared_error(x0, x1), difference.pow(2).mean((1, 2, 3)))
    assert torch.allclose(squared_error(x0, x1, "half_sum"), 0.5 * difference.pow(2).sum((1, 2, 3)))


@pytest.mark.parametrize("path", [Linear(), VP()], ids=["linear", "vp"])
def test_network_sees_the_state_and_the_target_is_the_path_velocity(path):
    x0, x1 = pair()
    t = torch.tensor([0.001, 0.3, 0.6, 0.9], dtype=torch.float64)
    seen = {}

    def velocity(x, time):
        seen.update(x=x, t=time)
        return torch.zeros_like(x)

    loss = flow_matching_loss(velocity, x0, x1, t, path=path)
    torch.testing.assert_close(seen["x"], path.interpolate(x0, x1, t))
    assert torch.equal(seen["t"], t)
    torch.testing.assert_close(loss, path.velocity(x0, x1, t).square().mean((1, 2, 3)))


def test_distillation_times_keep_the_whole_displacement():
    x0, x1 = pair()
    for law in (Fixed(1e-3), Grid(4), Fixed(1.0)):
        t = law.quantile(torch.full((4,), 0.6, dtype=torch.float64))
        loss = flow_matching_loss(lambda x, t: x1 - x0, x0, x1, t)
        assert loss.abs().max() == 0


def test_swapping_the_ends_changes_nothing():
    """(x0, x1, t) -> (x1, x0, 1 - t) with v -> -v, rectified flow section 8."""
    x0, x1 = pair()
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)

    def velocity(x, t):
        return x.sin() * t[:, None, None, None]

    one = flow_matching_loss(velocity, x0, x1, t)
    two = flow_matching_loss(lambda x, s: -velocity(x, 1 - s), x1, x0, 1 - t)
    torch.testing.assert_close(one, two)


def test_the_exact_velocity_is_a_minimum():
    flow = MixtureFlow(Mixture.gaussian(torch.tensor([0.4], dtype=torch.float64), 0.5))
    gen = torch.Generator().manual_seed(0)
    x0, n1 = torch.randn(2, 50000, 1, dtype=torch.float64, generator=gen)
    t = torch.rand(50000, dtype=torch.float64, generator=gen)
    bump = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = flow_matching_loss(lambda x, t: flow.velocity(x, t) + bump * x.cos(), x0, 0.4 + 0.5 * n1, t).mean()
    (slope,) = torch.autograd.grad(loss, bump)
    assert abs(slope.item()) < 0.015


def test_errors():
    with pytest.raises(ValueError, match="differ in shape"):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="'sum'"):
        squared_error(torch.zeros(2, 3), torch.zeros(2, 3), "sum")
