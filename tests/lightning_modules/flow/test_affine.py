"""Guidance of Gaussian laws, and the likelihood of an affine flow (data u, noise z = (u - mu) / sigma, no time)."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm

from penstock.lightning_modules.flow.affine import LinearGuidance, ScoreGuidance, nll


def laws(*values):
    """Law of one token of one channel, and that it is the last."""
    return [torch.tensor([[[v]]], dtype=torch.float64) for v in values], torch.ones(1, dtype=torch.float64)


def guided(guidance, *values):
    numbers, place = laws(*values)
    return [float(v) for v in guidance(*numbers, place)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1, 0.5, 0, 1), (1.2, 0.1**0.5)), ((1, 1, 0, 1), (3, 1)), ((1, 2, 0, 1), (3, 2))],
)
def test_numbers_of_the_paper(values, expected):
    assert guided(ScoreGuidance(2.0), *values) == pytest.approx(expected)


@pytest.mark.parametrize("guidance", [ScoreGuidance(0.0), LinearGuidance(0.0)])
def test_no_weight_is_the_conditional_law(guidance):
    assert guided(guidance, 0.7, 0.4, -2.0, 1.5) == pytest.approx((0.7, 0.4))


@pytest.mark.parametrize("guidance", [ScoreGuidance(3.0), LinearGuidance(3.0)])
def test_equal_laws_stay_as_they_are(guidance):
    assert guided(guidance, 0.7, 0.4, 0.7, 0.4) == pytest.approx((0.7, 0.4))


def test_the_scale_is_never_above_the_conditional_one():
    generator = torch.Generator().manual_seed(0)
    mu_c, mu_u = torch.randn(2, 1, 500, 1, generator=generator)
    sigma_c, sigma_u = torch.rand(2, 1, 500, 1, generator=generator) * 3 + 0.03
    _, sigma = ScoreGuidance(7.0)(mu_c, sigma_c, mu_u, sigma_u, torch.ones(500))
    assert (sigma <= sigma_c).all()
    assert (sigma > 0).all()


def distribution(mu_c, sigma_c, mu_u, sigma_u, w):
    """Distribution function of the normed density `p_c^(1 + w) p_u^-w`, summed on a grid."""
    x = np.linspace(-8, 8, 40001)
    log = (1 + w) * norm.logpdf(x, mu_c, sigma_c) - w * norm.logpdf(x, mu_u, sigma_u)
    mass = np.exp(log - log.max()).cumsum()
    return lambda values: np.interp(values, x, mass / mass[-1])


@pytest.mark.parametrize("w", [0.5, 2.0])
def test_guided_samples_have_the_density_of_the_guided_score(w):
    values = (1.0, 0.6, -0.5, 1.2)
    noise = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = distribution(*values, w)
    p_values = []
    for guidance in (ScoreGuidance(w), LinearGuidance(w)):
        mu, sigma = guided(guidance, *values)
        p_values.append(kstest((mu + sigma * noise).numpy(), expected).pvalue)
    assert p_values[0] > 0.05
    assert p_values[1] < 1e-6


def test_linear_guidance():
    values = (1.0, 0.5, 0.0, 1.0)
    assert guided(LinearGuidance(2.0), *values) == pytest.approx((3.0, 0.125))
    assert guided(LinearGuidance(2.0, mean=False), *values) == pytest.approx((1.0, 0.125))
    assert guided(LinearGuidance(2.0, scale=False), *values) == pytest.approx((3.0, 0.5))


def test_annealed_guidance_grows_with_the_place():
    one, zero, place = torch.ones(2, 4, 3), torch.zeros(2, 4, 3), torch.tensor([0.25, 0.5, 0.75, 1.0])
    mu, sigma = LinearGuidance(2.0, annealed=True)(one, one / 2, zero, one, place)
    assert mu[1, :, 2].tolist() == pytest.approx([1.5, 2.0, 2.5, 3.0])
    assert sigma[0, :, 0].log2().tolist() == pytest.approx([-1.5, -2.0, -2.5, -3.0])


@pytest.mark.parametrize("kind", [ScoreGuidance, LinearGuidance])
def test_negative_weights(kind):
    with pytest.raises(ValueError, match=r"guidance: weight=-0.5, expected 0 or more"):
        kind(-0.5)


def test_likelihood_of_one_affine_step():
    generator = torch.Generator().manual_seed(0)
    u, mu = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    sigma = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64) + 0.1
    found = nll((u - mu) / sigma, [-sigma.log()]) + math.log(2 * math.pi) / 2
    expected = -torch.distributions.Normal(mu, sigma).log_prob(u).mean((1, 2))
    torch.testing.assert_close(found, expected)


def test_likelihood_adds_up_blocks_of_any_grouping_and_leaves_half_precision():
    z, logdets = torch.full((2, 3, 4), 1.5).bfloat16(), [torch.ones(2, 12), torch.full((2, 3, 2, 2), 0.5)]
    found = nll(z, logdets)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([0.5 * 1.5**2 - 1.5] * 2)
