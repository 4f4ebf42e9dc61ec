"""The oracle against autograd, quadrature and the closed forms of the specs."""

import math

import pytest
import torch

from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.paths import EDM, VE, VP, Cosine, Linear, SubVP

PATHS = [Linear(), Cosine(), VP(), SubVP(), VE(sigma_max=5.0), EDM(sigma_max=5.0)]


def mixture(shift=0.0):
    return Mixture(
        torch.tensor([[-2.0, 0.5], [1.0, 0.0], [0.3, -1.0]], dtype=torch.float64) + shift,
        torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
        torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64),
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source", [None, mixture(1.5)], ids=["gaussian", "mixture"])
def test_score_is_the_gradient_of_the_log_density(path, source):
    flow = MixtureFlow(mixture(), source, path)
    t = torch.linspace(0.1, 0.95, 7, dtype=torch.float64)
    x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (grad,) = torch.autograd.grad(flow.log_density(x, t).sum(), x)
    torch.testing.assert_close(flow.score(x, t).detach(), grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("source", [None, mixture(1.5)], ids=["gaussian", "mixture"])
def test_continuity_equation(path, source):
    """d log p / dt + div v + v . grad log p = 0 ties density, score and velocity together."""
    flow = MixtureFlow(mixture(), source, path)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64).requires_grad_()
    (d_time,) = torch.autograd.grad(flow.log_density(x, t).sum(), t)
    v = flow.velocity(x, t)
    div = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    residual = d_time + div + (v * flow.score(x, t)).sum(1)
    torch.testing.assert_close(residual.detach(), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_posterior_means_rebuild_the_state():
    flow = MixtureFlow(mixture(), mixture(-1.0), Cosine())
    x = torch.randn(5, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    rebuilt = Cosine().alpha(t)[:, None] * flow.data(x, t) + Cosine().sigma(t)[:, None] * flow.noise(x, t)
    torch.testing.assert_close(rebuilt, x)


def test_gaussian_velocity_and_map_closed_forms():
    """Rectified flow section 8: v* and Z_t for N(0, 1) -> N(m, s^2)."""
    m, s = 0.3, 0.5
    flow = MixtureFlow(Mixture.gaussian(torch.tensor([m], dtype=torch.float64), s))
    t = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    variance = (1 - t) ** 2 + t**2 * s**2
    expected = m + (t * s**2 - (1 - t)) / variance * (x - t * m)
    torch.testing.assert_close(flow.velocity(x[:, None], t)[:, 0], expected)
    moved = flow.flow_map(x[:, None], torch.zeros_like(t), t)[:, 0]
    torch.testing.assert_close(moved, t * m + variance.sqrt() * x)


def test_mean_flow_figures():
    """Diffusion principles section 8.7, mirrored: from our t = 0.2 to 0.8, s0 = 0.5."""
    flow = MixtureFlow(Mixture.gaussian(torch.zeros(1, dtype=torch.float64), 0.5))
    z = torch.tensor([[0.7]], dtype=torch.float64)
    t, r = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    end = flow.flow_map(z, t, r)
    assert end.item() == pytest.approx(0.388290, abs=5e-7)
    average = (end - z) / 0.6
    assert average.item() == pytest.approx(-0.519516, abs=5e-7)

    def mean_velocity(time, state):
        return (flow.flow_map(state, time, r) - state) / (r - time)

    h = 1e-5
    v = flow.velocity(z, t)
    slope = (mean_velocity(t + h, z + h * v) - mean_velocity(t - h, z - h * v)) / (2 * h)
    torch.testing.assert_close(average, v + 0.6 * slope, rtol=0, atol=1e-8)


def test_mixture_density_integrates_to_one_and_samples_follow_it():
    law = mixture()
    axis = torch.linspace(-6, 6, 401, dtype=torch.float64)
    cells = torch.cartesian_prod(axis, axis)
    density = law.log_prob(cells).exp()
    step = (axis[1] - axis[0]) ** 2
    assert (density.sum() * step).item() == pytest.approx(1, abs=1e-6)
    x = law.sample(40000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), law.weights @ law.means, rtol=0, atol=0.03)
    second = (law.weights[:, None] * (law.means**2 + law.stds[:, None] ** 2)).sum(0)
    torch.testing.assert_close(x.square().mean(0), second, rtol=0, atol=0.05)


def test_data_end_is_the_target_law():
    flow = MixtureFlow(mixture())
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.log_density(x, torch.ones(5, dtype=torch.float64)), mixture().log_prob(x))


def test_errors():
    with pytest.raises(ValueError, match="single Gaussians"):
        MixtureFlow(mixture()).flow_map(torch.zeros(1, 2), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"means \(K, D\)"):
        Mixture(torch.zeros(2, 2), torch.ones(3), torch.ones(2) / 2)
    assert math.isclose(Mixture.uniform(torch.zeros(4, 2), 1.0).weights.sum().item(), 1)
