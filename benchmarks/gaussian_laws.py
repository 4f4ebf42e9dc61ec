"""Gaussians fitted to data in closed form, what they say of held-out data, and the best linear predictor of frames.

Data may carry independent noise of a known variance: 1/12 level^2 is uniform dequantisation. Fit and score are exact
means over that noise, so no draw is needed, and the noise alone keeps the covariance invertible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.benchmarks.known_laws import CONSTANT


@dataclass(frozen=True)
class Gaussian:
    """A law of vectors.

    Args:
        mean: `(D,)`.
        covariance: `(D, D)`, positive definite.
    """

    mean: Tensor
    covariance: Tensor

    def part(self, which: slice) -> "Gaussian":
        """The law of some of the numbers."""
        return Gaussian(self.mean[which], self.covariance[which, which])

    def nats(self, x: Tensor, variance: float = 0.0) -> Tensor:
        """Mean over the noise of `-log p(x + noise)`, nats `(n,)`.

        It is `(x - m)^T S^-1 (x - m) / 2 + v tr(S^-1) / 2 + log det(2 pi S) / 2`: noise adds the trace.

        Args:
            x: Data without the noise `(n, D)`.
            variance: v, of the noise.
        """
        root = torch.linalg.cholesky(self.covariance)
        white = torch.linalg.solve_triangular(root, (x - self.mean).T, upper=False)
        trace = variance * torch.cholesky_inverse(root).diagonal().sum() if variance else 0.0
        return 0.5 * (white.square().sum(0) + trace) + root.diagonal().log().sum() + CONSTANT * len(self.mean)


def fit(x: Tensor, variance: float = 0.0) -> Gaussian:
    """Largest likelihood on data `(n, D)` with noise, in the mean over the noise: `cov(x) + v I`.

    Args:
        x: Data without the noise.
        variance: v, of the noise.
    """
    x = x.double()
    return Gaussian(x.mean(0), torch.cov(x.T, correction=0) + variance * torch.eye(x.shape[1], dtype=x.dtype))


def fit_classes(x: Tensor, label: Tensor, variance: float, share: float) -> list[Gaussian]:
    """A Gaussian of each class; covariances lean to their mean (Friedman 1989, regularized discriminant analysis).

    Args:
        x: Data without the noise `(n, D)`.
        label: Classes `(n,)`, 0 to K - 1, each with some data.
        variance: Of the noise.
        share: Of the covariance within all classes, in [0, 1].
    """
    parts = [x[label == k] for k in range(int(label.max()) + 1)]
    laws = [fit(part, variance) for part in parts]
    within = sum(law.covariance * len(part) for law, part in zip(laws, parts)) / len(x)
    return [Gaussian(law.mean, (1 - share) * law.covariance + share * within) for law in laws]


def class_nats(laws: list[Gaussian], x: Tensor, label: Tensor, variance: float) -> Tensor:
    """Nats of samples `(n,)`, each under the law of its class; see `Gaussian.nats`."""
    found = torch.stack([law.nats(x, variance) for law in laws])
    return found.gather(0, label[None])[0]


def chosen_share(x: Tensor, label: Tensor, variance: float, shares: Sequence[float], folds: int = 5) -> float:
    """The `share` of `fit_classes` that is best in cross-validation; fold k is the samples whose number is k mod folds.

    Args:
        x: Data without the noise `(n, D)`.
        label: Classes `(n,)`.
        variance: Of the noise.
        shares: To choose from.
        folds: How many.
    """
    fold = torch.arange(len(x)) % folds

    def score(share: float) -> float:
        parts = [(fold != k, fold == k) for k in range(folds)]
        laws = [(fit_classes(x[kept], label[kept], variance, share), held) for kept, held in parts]
        return float(sum(class_nats(law, x[held], label[held], variance).sum() for law, held in laws))

    return min(shares, key=score)


def frame_nats(law: Gaussian, x: Tensor, frame: int, order: int, variance: float) -> Tensor:
    """Nats of a frame `(n,)` given those before it, under the best linear predictor with Gaussian errors.

    The predictor is the conditional law: nats of the frames seen and the one predicted, less nats of those seen.

    Args:
        law: Of whole clips with noise, as vectors of T D numbers.
        x: Clips without the noise `(n, T, D)`.
        frame: Which, from 0.
        order: Frames that are seen, as far as there are so many.
        variance: Of the noise, on the frames seen and predicted alike.
    """
    size, start = x.shape[2], max(0, frame - order)
    seen, both = slice(start * size, frame * size), slice(start * size, (frame + 1) * size)
    x = x.flatten(1).to(law.mean)
    nats = law.part(both).nats(x[:, both], variance)
    return nats if start == frame else nats - law.part(seen).nats(x[:, seen], variance)
