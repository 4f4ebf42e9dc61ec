"""Closed forms against enumeration: noise of two equally likely values has any variance, and its mean can be summed."""

import itertools
import json
import math

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from penstock.benchmarks import moving_digits_gaussian
from penstock.benchmarks.gaussian_laws import Gaussian, chosen_share, class_nats, fit, fit_classes, frame_nats

VARIANCE = 0.3


def signs(x: Tensor) -> Tensor:
    """Vectors `(n, D)` with every noise of +-sqrt(0.3), `(2^D, n, D)`: in the mean, noise of variance 0.3."""
    each = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=x.shape[1])), dtype=torch.float64)
    return x + math.sqrt(VARIANCE) * each[:, None]


@pytest.fixture
def x() -> Tensor:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=g, dtype=torch.float64)
    return torch.randn(40, 4, generator=g, dtype=torch.float64) @ mix + torch.arange(4)


def test_nats_and_fit_are_means_over_the_noise(x):
    law, noisy = fit(x, VARIANCE), signs(x)
    torch.testing.assert_close(law.covariance, torch.cov(noisy.flatten(0, 1).T, correction=0))
    torch.testing.assert_close(law.mean, noisy.flatten(0, 1).mean(0))
    other = torch.distributions.MultivariateNormal(law.mean, law.covariance)
    torch.testing.assert_close(law.nats(x, VARIANCE), -other.log_prob(noisy).mean(0))
    torch.testing.assert_close(law.nats(x), -other.log_prob(x))


@pytest.mark.parametrize(("frame", "order"), [(0, 2), (2, 0), (1, 2), (3, 2), (3, 3)])
def test_frames_are_predicted_by_least_squares(x, frame, order):
    noisy, seen = signs(x).flatten(0, 1), slice(max(0, frame - order), frame)
    past = torch.cat([torch.ones(len(noisy), 1), noisy[:, seen]], 1)
    weights = torch.linalg.lstsq(past, noisy[:, frame : frame + 1]).solution
    error = (noisy[:, frame : frame + 1] - past @ weights).square().mean()
    nats = frame_nats(fit(x, VARIANCE), x[..., None], frame, order, VARIANCE)
    assert float(nats.mean()) == pytest.approx(0.5 * math.log(2 * math.pi * math.e * float(error)))


def test_covariances_of_classes(x):
    label = (torch.arange(len(x)) % 3 > 0).long()
    own, mixed, common = (fit_classes(x, label, 0.0, share) for share in (0.0, 0.25, 1.0))
    within = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True).fit(x.numpy(), label.numpy()).covariance_
    torch.testing.assert_close(common[0].covariance, torch.from_numpy(within))
    torch.testing.assert_close(own[1].covariance, torch.cov(x[label == 1].T, correction=0))
    torch.testing.assert_close(mixed[1].covariance, 0.75 * own[1].covariance + 0.25 * common[1].covariance)
    nats = class_nats(own, x, label, 0.0)
    torch.testing.assert_close(nats[label == 1], own[1].nats(x[label == 1]))
    torch.testing.assert_close(nats[label == 0], own[0].nats(x[label == 0]))


def test_cross_validation_shares_covariances_that_are_alike_and_only_those():
    g = torch.Generator().manual_seed(0)
    alike = torch.randn(100, 6, generator=g, dtype=torch.float64)
    assert chosen_share(alike, torch.arange(100) // 10, 0.0, [0.0, 0.5, 1.0]) == 1.0
    scales = torch.where(torch.arange(100) < 50, 1.0, 10.0)[:, None]
    assert chosen_share(alike * scales, torch.arange(100) // 50, 0.0, [0.0, 0.5, 1.0]) == 0.0


def test_part_of_a_law():
    law = Gaussian(torch.arange(3.0), torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    part = law.part(slice(1, 3))
    assert part.mean.tolist() == [1, 2]
    assert part.covariance.tolist() == [[2, 0], [0, 3]]


def test_moving_digits_leave_their_table(tmp_path):
    threads = torch.get_num_threads()
    words = ["--n-train", "40", "--n-test", "6", "--frames", "3", "--threads", "1", "--out", str(tmp_path)]
    assert moving_digits_gaussian.main(words) == 0
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "moving_digits_gaussian.json").read_text())["rows"]
    nats = [row["1 px a frame"] for row in rows]
    assert nats != [row["2 px a frame"] for row in rows]
    assert len(nats) == 5
    assert nats[0] != nats[1] != nats[2]
    assert nats[2] == nats[3] == nats[4]
