import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid

from penstock.lightning_modules.callbacks.distances import (
    GaussianSums,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def features(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def moments(x):
    sums = GaussianSums()
    sums.update(x)
    return sums.moments()


def test_moments_are_numpys_for_any_split():
    x = features(103, 7, 0, shift=3.0)
    sums = GaussianSums()
    for part in x.split([50, 1, 52]):
        sums.update(part)
    mean, cov = sums.moments()
    assert sums.count == 103
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), rtol=1e-11)


def test_one_sample_has_no_covariance():
    sums = GaussianSums()
    sums.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 samples, found 1"):
        sums.moments()


def test_frechet_of_commuting_gaussians_is_closed_form():
    a, b = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 9.0, 2.0]).double()
    mean_a, mean_b = torch.tensor([1.0, 0, 0]).double(), torch.tensor([0.0, 2, 0]).double()
    turn = torch.linalg.qr(features(3, 3, 5)).Q
    expected = 5 + ((a.sqrt() - b.sqrt()) ** 2).sum()
    found = frechet_distance(mean_a, turn @ a.diag() @ turn.T, mean_b, turn @ b.diag() @ turn.T)
    assert found == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("n", [400, 20])
def test_frechet_agrees_with_three_others_also_when_singular(n):
    x, y = features(n, 30, 1), features(n + 3, 30, 2, shift=0.5)
    (m, c), (k, s) = moments(x), moments(y)
    found = frechet_distance(m, c, k, s)
    ours = (fid_features_to_statistics(v) for v in (x, y))
    fidelity = fid_statistics_to_metric(*ours, verbose=False)["frechet_inception_distance"]
    root = scipy.linalg.sqrtm((c @ s).numpy())
    by_scipy = float((m - k).square().sum() + c.trace() + s.trace() - 2 * np.trace(root).real)
    rel = 1e-10 if n > 30 else 1e-6
    assert found == pytest.approx(fidelity, rel=rel)
    assert found == pytest.approx(by_scipy, rel=rel)
    assert found == pytest.approx(float(_compute_fid(m, c, k, s)), rel=rel)


def test_frechet_to_itself_is_zero_when_singular():
    mean, cov = moments(features(10, 40, 3))
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-10 * float(cov.trace())


def test_frechet_to_a_single_point_is_the_spread_around_it():
    mean, cov = moments(features(50, 4, 3))
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    found = frechet_distance(mean, cov, mean + 1, nothing)
    assert found == pytest.approx(4 + float(cov.trace()), rel=1e-12)


def test_kernel_distance_is_the_mean_over_pairs():
    x, y = features(9, 4, 1), features(6, 4, 2)

    def k(a, b):
        return (float(a @ b) / 4 + 1) ** 3

    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    xy = [k(a, b) for a in x for b in y]
    assert kernel_distance(x, y) == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy), rel=1e-12)


def test_kernel_distance_is_torch_fidelitys_on_the_whole_set():
    x, y = features(1100, 6, 1), features(1100, 6, 2)
    fidelity = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=1100, verbose=False)
    assert kernel_distance(x, y) == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-10)


def brute_share_inside(points, centres):
    radius = [sorted(float((a - b).norm()) for b in centres)[3] for a in centres]
    return np.mean([any(float((p - c).norm()) <= r for c, r in zip(centres, radius)) for p in points])


def test_precision_and_recall_are_brute_forces_and_not_swapped():
    real, fake = features(40, 3, 1), features(25, 3, 1) * 0.3
    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(brute_share_inside(fake, real))
    assert recall == pytest.approx(brute_share_inside(real, fake))
    assert precision > recall + 0.2
    whole = prc_features_to_metric(fake, real, verbose=False)
    assert (precision, recall) == pytest.approx((whole["precision"], whole["recall"]))


@pytest.mark.parametrize(("distance", "rows"), [(kernel_distance, 1), (precision_recall, 3)])
def test_too_few_samples_are_named(distance, rows):
    with pytest.raises(ValueError, match=f"found 9 and {rows}"):
        distance(features(9, 2, 0), features(rows, 2, 0))
