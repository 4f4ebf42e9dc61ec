"""Likelihood: exact against the mixture's density, Hutchinson's mean, one probe, errors."""

import math

import pytest
import torch

from penstock.lightning_modules.flow import grids
from penstock.lightning_modules.flow.likelihood import bits_per_dim, divergence, log_prob, probe
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.paths import VE, VP, Linear
from penstock.lightning_modules.flow.solvers import RK45, DPMSolverPP2M, Heun

LAW = Mixture(
    torch.tensor([[-2.0, 0.5], [1.0, 0.0]], dtype=torch.float64),
    torch.tensor([0.3, 0.5], dtype=torch.float64),
    torch.tensor([0.4, 0.6], dtype=torch.float64),
)
X = torch.tensor([[-2.0, 0.4], [-1.0, 0.1], [0.9, -0.4], [1.5, 1.0]], dtype=torch.float64)
DOWN = torch.tensor([1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(("path", "stop"), [(Linear(), 1.0), (VP(), 1 - 1e-5), (VE(sigma_max=200.0), 1 - 1e-5)])
def test_exact_trace_gives_the_mixture_density(path, stop):
    """Diffusion principles section 8.10; VE and VP only reach their Gaussian approximately at t = 0."""
    flow = MixtureFlow(LAW, path=path)
    grid = torch.tensor([stop, 0.0], dtype=torch.float64)
    result = log_prob(flow.velocity, X, grid, solver=RK45(1e-7, 1e-7), trace="exact", path=path)
    torch.testing.assert_close(result.log_prob, LAW.log_prob(X), rtol=0, atol=2e-3 if path != Linear() else 1e-5)


def test_five_hundred_heun_steps_reach_a_thousandth():
    flow = MixtureFlow(LAW)
    result = log_prob(flow.velocity, X, grids.uniform(500).flip(0), solver=Heun(), trace="exact")
    torch.testing.assert_close(result.log_prob, LAW.log_prob(X), rtol=0, atol=1e-3)
    assert result.nfe == 1000
    assert result.z.shape == X.shape


def test_hutchinson_is_unbiased_for_both_probes():
    """The average over probes of the log-likelihood along the same path is the exact one."""
    flow = MixtureFlow(LAW)
    exact = LAW.log_prob(X[1:2])
    gen = torch.Generator().manual_seed(0)
    repeated = X[1:2].expand(6000, 2)
    for noise in ("rademacher", "gaussian"):
        values = log_prob(
            flow.velocity, repeated, grids.uniform(40).flip(0), solver=Heun(), noise=noise, generator=gen
        ).log_prob
        assert values.std() > 0.05
        standard_error = values.std().item() / math.sqrt(len(values))
        assert values.mean().item() == pytest.approx(exact.item(), abs=4 * standard_error + 5e-3)


def test_rademacher_is_exact_for_a_diagonal_jacobian():
    law = Mixture.gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), 0.5)
    flow = MixtureFlow(law)
    result = log_prob(flow.velocity, X, DOWN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(result.log_prob, law.log_prob(X), rtol=0, atol=1e-3)
    torch.testing.assert_close(result.z, (X - law.means) / 0.5, rtol=0, atol=1e-3)


def test_one_probe_for_the_whole_integration_and_seeds():
    flow = MixtureFlow(LAW)
    epsilon = probe(X, "rademacher", torch.Generator().manual_seed(7))
    given = log_prob(flow.velocity, X, DOWN, epsilon=epsilon).log_prob
    drawn = log_prob(flow.velocity, X, DOWN, generator=torch.Generator().manual_seed(7)).log_prob
    assert torch.equal(given, drawn)
    assert set(epsilon.unique().tolist()) == {-1.0, 1.0}


def test_divergence_against_the_jacobian():
    def velocity(x, t):
        return torch.stack([x[:, 0] * x[:, 1] + t, x[:, 1].sin() * x[:, 0] ** 2], dim=1)

    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    v, exact = divergence(velocity, X, t)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda x, i=i: velocity(x[None], t[i : i + 1])[0], X[i]) for i in range(4)]
    )
    torch.testing.assert_close(exact, jacobian.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(v, velocity(X, t))
    epsilon = probe(X, "gaussian", torch.Generator().manual_seed(0))
    _, estimate = divergence(velocity, X, t, epsilon)
    torch.testing.assert_close(estimate, torch.einsum("bi,bij,bj->b", epsilon, jacobian, epsilon))


def test_works_without_gradient_and_on_images():
    conv = torch.nn.Conv2d(3, 3, 3, padding=1)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        result = log_prob(
            lambda x, t: conv(x), x, torch.tensor([1.0, 1e-5]), generator=torch.Generator().manual_seed(0)
        )
    assert result.z.shape == x.shape
    assert result.log_prob.shape == (2,)
    assert not result.log_prob.requires_grad


def test_bits_per_dim():
    """A uniform density over [-1, 1]^d costs 8 bits with the offset of 8-bit data, one over [0, 1]^d as well."""
    dim = 12
    assert bits_per_dim(torch.tensor(-dim * math.log(2.0)), dim, 7.0).item() == pytest.approx(8.0)
    assert bits_per_dim(torch.tensor(0.0), dim, 8.0).item() == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("kwargs", "grid", "message"),
    [
        ({}, (0.0, 1.0), "must descend"),
        ({"solver": DPMSolverPP2M()}, (1.0, 0.0), "plain ODE solver"),
        ({"trace": "exact", "epsilon": X}, (1.0, 0.0), "takes no epsilon"),
        ({"epsilon": X[:2]}, (1.0, 0.0), "shape of x"),
    ],
)
def test_errors(kwargs, grid, message):
    with pytest.raises(ValueError, match=message):
        log_prob(lambda x, t: x, X, torch.tensor(grid), **kwargs)
