"""Straightness, crossing and the cost identity: closed forms and the three-mode toy (rectified flow section 8)."""

import math

import pytest
import torch

from penstock.lightning_modules.flow import grids
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.solvers import Euler, Heun
from penstock.lightning_modules.flow.straightness import cost_identity, crossing, straightness, transport_cost
from penstock.lightning_modules.flow.times import stratified


def gaussian(std):
    return MixtureFlow(Mixture.gaussian(torch.zeros(1, dtype=torch.float64), std))


@pytest.mark.parametrize(("steps", "value"), [(10, 0.37918), (100, 0.42374), (1000, 0.42865)])
def test_discrete_straightness_figures(steps, value):
    """Row 9; the flow is linear and x0 = 1 carries the second moment of N(0, 1)."""
    s, _ = straightness(gaussian(1.0).velocity, torch.ones(1, 1, dtype=torch.float64), grids.uniform(steps))
    assert s.item() == pytest.approx(value, abs=6e-6)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_cost_identity_of_gaussians(std):
    """Row 1: S = 2s - pi s / 2, V = pi s / 2, costs 1 + s^2 and (1 - s)^2."""
    gen = torch.Generator().manual_seed(0)
    n = 20_000
    x0, x1 = torch.randn(2, n, 1, dtype=torch.float64, generator=gen)
    x0, x1 = x0 / x0.square().mean().sqrt(), x1 / x1.square().mean().sqrt()
    t = stratified(torch.rand(n, dtype=torch.float64, generator=gen))
    terms = cost_identity(gaussian(std).velocity, x0, std * x1, t, grids.uniform(300), solver=Heun())
    assert terms.cost_before.item() == pytest.approx(1 + std**2, rel=0.02)
    assert terms.cost_after.item() == pytest.approx((1 - std) ** 2, abs=0.01)
    assert terms.straightness.item() == pytest.approx(2 * std - math.pi * std / 2, rel=0.015)
    assert terms.crossing.item() == pytest.approx(math.pi * std / 2, rel=0.02)
    assert abs(terms.gap.item()) < 0.02 * (1 + std**2)


def test_straight_flow_has_no_straightness_and_no_crossing():
    """Row 8: reflow pairs of the exact 2-rectified flow cost nothing."""
    m, s = 0.3, 0.5

    def velocity(x, t):
        t = t[:, None]
        return m + (s - 1) * (x - t * m) / (1 - t + t * s)

    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    value, z1 = straightness(velocity, x0, grids.uniform(20))
    assert value.max() < 1e-24
    assert crossing(velocity, x0, z1, torch.rand(9, dtype=torch.float64)).max() < 1e-24


def test_minimum_of_the_training_loss_is_half_pi_per_dimension():
    """Row 8, s = 1."""
    gen = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, 100_000, 1, dtype=torch.float64, generator=gen)
    t = stratified(torch.rand(100_000, dtype=torch.float64, generator=gen))
    assert crossing(gaussian(1.0).velocity, x0, x1, t).mean().item() == pytest.approx(math.pi / 2, rel=0.02)


def test_transport_cost_values():
    x0, x1 = torch.zeros(2, 1, 2), torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert transport_cost(x0, x1).tolist() == [25.0, 4.0]
    assert transport_cost(x0, x1, 1.0).tolist() == [5.0, 2.0]


@pytest.fixture(scope="module")
def three_modes():
    """The toy of the spec: exact velocity from 9 pairs of components, its flow by 400 Heun steps."""
    h = 10 * math.sqrt(3) / 2
    source = Mixture.uniform(torch.tensor([[h, 5.0], [-h, 5.0], [0.0, -h]], dtype=torch.float64), math.sqrt(0.3))
    target = Mixture.uniform(torch.tensor([[h, -5.0], [-h, -5.0], [0.0, h]], dtype=torch.float64), math.sqrt(0.3))
    flow = MixtureFlow(target, source)
    gen = torch.Generator().manual_seed(0)
    x0, x1 = source.sample(8_000, gen), target.sample(8_000, gen)
    t = stratified(torch.rand(8_000, dtype=torch.float64, generator=gen))
    terms = cost_identity(flow.velocity, x0, x1, t, grids.uniform(200), solver=Heun())
    return flow, x0, x1, terms


def distance_to_modes(flow, x):
    return torch.cdist(x, flow.target.means).min(1).values.square().mean().sqrt().item()


def test_three_mode_costs(three_modes):
    flow, _, _, terms = three_modes
    assert terms.cost_before.item() == pytest.approx(184.932, rel=0.02)
    assert terms.cost_after.item() == pytest.approx(78.7, abs=1.0)
    assert terms.straightness.item() == pytest.approx(85.6, rel=0.02)
    gen = torch.Generator().manual_seed(2)
    x0, x1 = (law.sample(100_000, gen) for law in (flow.source, flow.target))
    v = (
        crossing(flow.velocity, x0, x1, stratified(torch.rand(100_000, dtype=torch.float64, generator=gen)))
        .mean()
        .item()
    )
    assert v == pytest.approx(21.0, rel=0.03)
    assert terms.straightness.item() + v == pytest.approx(184.932 - terms.cost_after.item(), rel=0.01)


def test_three_mode_cost_is_exact_in_expectation(three_modes):
    flow, *_ = three_modes
    pairs = torch.cdist(flow.source.means, flow.target.means).square().mean().item()
    assert pairs + 2 * 2 * 0.3 == pytest.approx(184.932, abs=2e-2)


@pytest.mark.parametrize(("steps", "value"), [(1, 9.107), (2, 6.16), (4, 3.34), (8, 1.77), (20, 0.976), (100, 0.790)])
def test_three_mode_euler_distances(three_modes, steps, value):
    flow, x0, *_ = three_modes
    out = Euler()(flow.velocity, x0, grids.uniform(steps)).x
    assert distance_to_modes(flow, out) == pytest.approx(value, rel=0.015)
    if steps == 1:
        torch.testing.assert_close(
            out, torch.tensor([[0.0, -0.446582]], dtype=out.dtype).expand_as(out), atol=1e-6, rtol=0
        )


def test_three_mode_transport(three_modes):
    """Each source mode splits evenly between its two nearer targets; convex costs fall (row 10)."""
    flow, x0, x1, _ = three_modes
    z1 = Heun()(flow.velocity, x0, grids.uniform(100)).x
    start = torch.cdist(x0, flow.source.means).argmin(1)
    end = torch.cdist(z1, flow.target.means).argmin(1)
    mass = torch.zeros(3, 3).index_put_((start, end), torch.tensor(1 / len(x0)), accumulate=True)
    far = torch.cdist(flow.source.means, flow.target.means).argmax(1)
    for i in range(3):
        near = [j for j in range(3) if j != far[i]]
        assert mass[i, far[i]] < 0.003
        assert mass[i, near].tolist() == pytest.approx([1 / 6, 1 / 6], abs=0.015)
    for p in (1.0, 2.0, 4.0):
        assert transport_cost(x0, z1, p).mean() < transport_cost(x0, x1, p).mean()
    assert distance_to_modes(flow, z1) == pytest.approx(math.sqrt(0.6), rel=0.02)
