"""Conversions among predictions, error ratios, loss weights (diffusion principles, section 8: 1, 2, 9)."""

import pytest
import torch

from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.paths import EDM, VE, VP, Cosine, ImprovedCosine, Linear, SubVP
from penstock.lightning_modules.flow.prediction import (
    PREDICTIONS,
    convert,
    edm_weight,
    elbo_weight,
    error_ratio,
    min_snr_weight,
    p2_weight,
    snr,
    to_data,
    to_noise,
)

PATHS = [Linear(), Cosine(), ImprovedCosine(), VP(), SubVP(), VE(), EDM()]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
T = torch.full((6,), 1 - 0.37, dtype=torch.float64)


def states(path):
    gen = torch.Generator().manual_seed(1)
    data, noise = torch.randn(2, 6, 4, dtype=torch.float64, generator=gen)
    return data, noise, path.interpolate(noise, data, T)


@each_path
@pytest.mark.parametrize("source", PREDICTIONS)
def test_round_trips_and_definitions(path, source):
    data, noise, x = states(path)
    a, s = path.alpha(T)[:, None], path.sigma(T)[:, None]
    truth = {
        "data": data,
        "noise": noise,
        "score": -noise / s,
        "v": a * noise - s * data,
        "velocity": path.d_alpha(T)[:, None] * data + path.d_sigma(T)[:, None] * noise,
    }
    scale = 1 + x.abs().max() / a.min()
    for target in PREDICTIONS:
        there = convert(truth[source], source, target, x, T, path)
        torch.testing.assert_close(there, truth[target], rtol=1e-11, atol=1e-13 * scale.item())
        back = convert(there, target, source, x, T, path)
        torch.testing.assert_close(back, truth[source], rtol=1e-11, atol=1e-13 * scale.item())


@each_path
def test_velocity_is_drift_minus_half_g2_score(path):
    """Our time runs against the sheet's: the noising drift f changes sign with the velocity."""
    data, noise, x = states(path)
    f = path.d_alpha(T) / path.alpha(T)
    g2 = path.reverse_diffusion(T).square()
    score = -noise / path.sigma(T)[:, None]
    expected = f[:, None] * x + 0.5 * g2[:, None] * score
    torch.testing.assert_close(path.velocity(noise, data, T), expected, rtol=1e-11, atol=1e-11)


@each_path
def test_error_ratios_against_evaluated_errors(path):
    data, _, x = states(path)
    wrong = data + 0.3 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    base = (wrong - data).square().sum(1)
    for kind in PREDICTIONS:
        error = convert(wrong, "data", kind, x, T, path) - convert(data, "data", kind, x, T, path)
        torch.testing.assert_close(error.square().sum(1), error_ratio(kind, T, path) * base, rtol=1e-10, atol=0)


@each_path
def test_velocity_error_ratio_is_alpha_lambda_prime(path):
    expected = (path.alpha(T) * path.d_half_log_snr(T)).square()
    torch.testing.assert_close(error_ratio("velocity", T, path), expected, rtol=1e-12, atol=0)


def test_linear_path_closed_forms():
    data, noise, x = states(Linear())
    v = data - noise
    t = T[:, None]
    torch.testing.assert_close(to_data(v, "velocity", x, T, Linear()), x + (1 - t) * v)
    torch.testing.assert_close(to_noise(v, "velocity", x, T, Linear()), x - t * v)
    torch.testing.assert_close(convert(v, "velocity", "score", x, T, Linear()), (t * v - x) / (1 - t))
    torch.testing.assert_close(error_ratio("velocity", T, Linear()), 1 / (1 - T).square())


def test_trigonometric_velocity_is_half_pi_v():
    data, noise, x = states(Cosine())
    u = Cosine().velocity(noise, data, T)
    v = convert(u, "velocity", "v", x, T, Cosine())
    torch.testing.assert_close(u, -torch.pi / 2 * v)


def test_velocity_and_v_are_finite_at_pure_noise():
    x = torch.randn(3, 2, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    v = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(to_data(v, "velocity", x, zero, Linear()), x + v)
    torch.testing.assert_close(to_data(v, "v", x, zero, Cosine()), -v)


def test_named_weights():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64).requires_grad_()
    for path in (Linear(), VP(), Cosine()):
        (slope,) = torch.autograd.grad(snr(t, path).sum(), t)
        torch.testing.assert_close(elbo_weight(t, path), 0.5 * slope, rtol=1e-9, atol=0)
        sigma = path.sigma(t) / path.alpha(t)
        torch.testing.assert_close(edm_weight(t, path), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
        ratio = snr(t, path)
        torch.testing.assert_close(min_snr_weight(t, path), torch.minimum(ratio, torch.full_like(ratio, 5.0)))
        torch.testing.assert_close(p2_weight(t, path), ratio / (1 + ratio))
    vp = VP()
    torch.testing.assert_close(error_ratio("v", t, vp), snr(t, vp) + 1)


def test_elbo_integral_of_zero_prediction():
    """With D = 0 the squared error is |x1|^2, so the weighted integral is |x1|^2 (SNR(b) - SNR(a)) / 2."""
    path = VP()
    t = torch.linspace(0.1, 0.9, 20001, dtype=torch.float64)
    integral = torch.trapezoid(elbo_weight(t, path), t)
    expected = 0.5 * (snr(t[-1], path) - snr(t[0], path))
    torch.testing.assert_close(integral, expected, rtol=1e-6, atol=0)


@each_path
def test_oracle_predictions_agree(path):
    flow = MixtureFlow(
        Mixture(
            torch.tensor([[-2.0], [1.0]], dtype=torch.float64),
            torch.tensor([0.3, 0.3], dtype=torch.float64),
            torch.tensor([0.4, 0.6], dtype=torch.float64),
        ),
        path=path,
    )
    x = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None] * path.source_std**0.5
    data = flow.data(x, T)
    for target, value in (("velocity", flow.velocity), ("score", flow.score), ("noise", flow.noise)):
        torch.testing.assert_close(convert(data, "data", target, x, T, path), value(x, T), rtol=1e-9, atol=1e-9)


def test_unknown_kind_is_named():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="unknown prediction 'epsilon': expected one of velocity"):
        convert(x, "epsilon", "data", x, torch.zeros(1), Linear())
    with pytest.raises(ValueError, match="'u'"):
        error_ratio("u", torch.zeros(1), Linear())
