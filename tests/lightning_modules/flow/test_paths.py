"""Paths: derivatives, endpoints, log-SNR and its inverse, precision near the data."""

import math

import pytest
import torch

from penstock.lightning_modules.flow.paths import EDM, VE, VP, Cosine, ImprovedCosine, Linear, SubVP

PATHS = [Linear(), Cosine(), ImprovedCosine(), VP(), SubVP(), VE(), EDM()]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


@each_path
def test_derivatives_match_autograd(path):
    t = torch.linspace(*path.snr_range, 41, dtype=torch.float64)[1:-1].requires_grad_()
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        out = value(t)
        expected = torch.autograd.grad(out.sum(), t)[0] if out.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t), expected, rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(path.half_log_snr(t).sum(), t)
    torch.testing.assert_close(path.d_half_log_snr(t), slope, rtol=1e-9, atol=0)


@each_path
def test_time_at_inverts_half_log_snr(path):
    t = torch.linspace(*path.snr_range, 101, dtype=torch.float64)
    torch.testing.assert_close(path.time_at(path.half_log_snr(t)), t, rtol=0, atol=1e-9)


@each_path
def test_everything_is_finite_on_the_stated_ranges(path):
    t = torch.linspace(*path.t_range, 1001, dtype=torch.float64)
    for value in (path.alpha, path.sigma, path.d_alpha, path.d_sigma):
        assert value(t).isfinite().all()
    t = torch.linspace(*path.snr_range, 1001, dtype=torch.float64)
    assert (path.alpha(t) > 0).all()
    assert (path.sigma(t) > 0).all()
    assert (path.half_log_snr(t).diff() > 0).all()


@each_path
def test_source_law_and_data_end(path):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert path.sigma(ends)[0].item() == pytest.approx(path.source_std, rel=1e-4)
    assert path.sigma(ends)[1].item() == pytest.approx(0, abs=1e-12)
    assert path.alpha(ends)[1].item() == pytest.approx(1, abs=1e-12)


@each_path
def test_interpolate_and_velocity_broadcast(path):
    gen = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=gen)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x_t, v = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
    h = 1e-6
    torch.testing.assert_close(x_t[2], path.alpha(t[2]) * x1[2] + path.sigma(t[2]) * x0[2])
    numeric = (path.interpolate(x0, x1, t + h) - path.interpolate(x0, x1, t - h)) / (2 * h)
    torch.testing.assert_close(v, numeric, rtol=1e-6, atol=1e-6)


def test_half_precision_states_stay_half():
    x = torch.randn(2, 3).bfloat16()
    assert VP().interpolate(x, x, torch.rand(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("path", [VP(), SubVP(), ImprovedCosine()], ids=lambda p: type(p).__name__)
def test_no_cancellation_near_the_data(path):
    s = torch.tensor([2.0**-14, 2.0**-10], dtype=torch.float64)
    exact = path.sigma(1 - s)
    torch.testing.assert_close(path.sigma(1 - s.float()).double(), exact, rtol=3e-6, atol=0)


def test_vp_keeps_variance_and_reverse_diffusion_is_the_beta():
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    for path in (VP(), ImprovedCosine(), Cosine()):
        torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))
    beta = 0.1 + (1 - t) * 19.9
    torch.testing.assert_close(VP().reverse_diffusion(t).square(), beta)
    torch.testing.assert_close(Linear().reverse_diffusion(t).square(), 2 * (1 - t) / t)
    torch.testing.assert_close(EDM().reverse_diffusion(t).square(), 2 * 80.0**2 * (1 - t))


def test_sheet_formulas_at_one_time():
    t = torch.tensor(0.3, dtype=torch.float64)
    alpha = math.exp(-0.25 * 19.9 * 0.49 - 0.5 * 0.1 * 0.7)
    assert VP().alpha(t).item() == pytest.approx(alpha, rel=1e-14)
    assert VP().sigma(t).item() == pytest.approx(math.sqrt(1 - alpha**2), rel=1e-14)
    assert SubVP().sigma(t).item() == pytest.approx(1 - alpha**2, rel=1e-14)
    assert VE().sigma(t).item() == pytest.approx(0.01 * math.sqrt(5000.0**1.4 - 1), rel=1e-12)
    a = math.pi / 2 * (0.7 + 0.008) / 1.008
    assert ImprovedCosine().alpha(t).item() == pytest.approx(
        math.cos(a) / math.cos(math.pi / 2 * 0.008 / 1.008), rel=1e-13
    )


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: VP(beta_min=0), "beta_min"),
        (lambda: SubVP(beta_min=3, beta_max=2), "beta_max"),
        (lambda: VE(sigma_min=2, sigma_max=1), "sigma_max"),
        (lambda: EDM(sigma_min=-1), "sigma_min"),
        (lambda: ImprovedCosine(offset=0), "offset"),
    ],
)
def test_bad_parameters(make, word):
    with pytest.raises(ValueError, match=word):
        make()
