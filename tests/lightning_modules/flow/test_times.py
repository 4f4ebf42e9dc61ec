"""Time laws: quantiles against the numeric inverse of the integrated density, and helpers."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from penstock.lightning_modules.flow import times

LAWS = [
    times.Uniform(),
    times.Uniform(eps=0.2),
    times.LogitNormal(),
    times.LogitNormal(mean=-0.4, std=1.7),
    times.UShaped(),
    times.UShaped(a=2.0, eps=1e-5),
    times.Beta(2.0, 1.0),
    times.Beta(1.5, 4.0),
    times.Beta(0.5, 0.5),
    times.Shift(times.Uniform(0.0), k=3.0),
    times.Shift(times.LogitNormal(0.3, 0.8), k=5.0),
]


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_quantile_inverts_the_integrated_density(law):
    for u in (0.03, 0.2, 0.5, 0.77, 0.96):
        low, t = law.quantile(torch.tensor([1e-10, u], dtype=torch.float64)).tolist()
        mass, _ = quad(lambda s: law.density(torch.tensor(s, dtype=torch.float64)).item(), low, t, limit=200)
        assert mass == pytest.approx(u, abs=2e-6)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_quantile_is_monotone_and_inside(law):
    u = torch.rand(10000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6).sort().values
    t = law.quantile(u)
    assert t.dtype == torch.float32
    assert t.isfinite().all()
    assert (t.diff() >= -1e-6).all()
    assert ((t >= 0) & (t <= 1)).all()
    outside = torch.tensor([-0.1, 1.1])
    assert (law.density(outside) == 0).all()


@pytest.mark.parametrize(("a", "b"), [(2.0, 1.0), (0.5, 0.5), (3.0, 7.0), (0.05, 2.0), (40.0, 30.0)])
def test_beta_quantile_against_scipy(a, b):
    u = np.concatenate([np.geomspace(1e-9, 0.5, 200), 1 - np.geomspace(0.5, 1e-9, 200)])
    ours = times.Beta(a, b).quantile(torch.from_numpy(u)).numpy()
    np.testing.assert_allclose(ours, stats.beta.ppf(u, a, b), rtol=2e-6, atol=1e-12)


def test_beta_density_against_scipy():
    t = np.linspace(0.01, 0.99, 50)
    np.testing.assert_allclose(times.Beta(1.5, 4).density(torch.from_numpy(t)), stats.beta.pdf(t, 1.5, 4), rtol=1e-12)


def test_u_shape_figures_of_the_sheet():
    law = times.UShaped(4.0)
    at = law.density(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)).tolist()
    assert at == pytest.approx([2.07463, 2.07463, 0.551441], rel=1e-5)
    t = law.quantile((torch.arange(200000, dtype=torch.float64) + 0.5) / 200000)
    assert t.var().item() == pytest.approx(0.115671, rel=1e-4)
    assert ((t < 0.1) | (t > 0.9)).double().mean().item() == pytest.approx(0.345007, abs=2e-5)
    two_exponentials = 4 * (math.exp(4 * 0.2) + math.exp(4 * 0.8)) / (2 * (math.exp(4) - 1))
    assert law.density(torch.tensor(0.2, dtype=torch.float64)).item() == pytest.approx(two_exponentials, rel=1e-12)


def test_grid_is_the_euler_grid():
    u = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    expected = torch.tensor([j / 4 * (1 - 1e-3) + 1e-3 for j in range(4)], dtype=torch.float64)
    torch.testing.assert_close(times.Grid(4).quantile(u), expected, rtol=0, atol=1e-16)
    assert times.Grid(3).quantile(torch.ones(1)).item() == pytest.approx(2 / 3 * 0.999 + 1e-3)


def test_fixed_and_uniform_values():
    u = torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert times.Fixed(1e-3).quantile(u).tolist() == [1e-3, 1e-3]
    assert torch.equal(times.Uniform(1e-3).quantile(u), u * (1 - 1e-3) + 1e-3)


def test_shift_is_the_sheet_formula_mirrored_in_time():
    u = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    noise_time = 1 - u
    expected = 1 - 3 * noise_time / (1 + 2 * noise_time)
    torch.testing.assert_close(times.Shift(times.Uniform(0.0), 3.0).quantile(u), expected)


def test_stratified_puts_one_sample_in_each_stratum():
    u = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strata = (times.stratified(u) * 64).floor().long()
    assert torch.equal(strata, torch.arange(64))


def test_low_discrepancy_is_an_equally_spaced_circle():
    t = times.low_discrepancy(torch.tensor(0.83, dtype=torch.float64), 8).sort().values
    torch.testing.assert_close(t.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))
    assert t[0] >= 0
    assert t[-1] < 1


@pytest.mark.parametrize("n", [1, 6, 7])
def test_antithetic_mirrors_the_first_half(n):
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    out = times.antithetic(u)
    half = (n + 1) // 2
    assert torch.equal(out[:half], u[:half])
    assert torch.equal(out[half:], 1 - u[: n - half])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: times.Uniform(1.0), "eps"),
        (lambda: times.LogitNormal(std=0), "std"),
        (lambda: times.UShaped(0.0), "Uniform"),
        (lambda: times.UShaped(4.0, eps=0.5), "eps"),
        (lambda: times.Beta(0.0, 1.0), "Beta"),
        (lambda: times.Fixed(1.5), "Fixed"),
        (lambda: times.Grid(0), "Grid.k"),
        (lambda: times.Shift(times.Uniform(), 0.0), "Shift.k"),
    ],
)
def test_bad_parameters(make, word):
    with pytest.raises(ValueError, match=word):
        make()
