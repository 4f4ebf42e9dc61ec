"""Data whose laws are known, for densities and denoisers: a mixture in the plane, Gaussians, AR(1) clips."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CONSTANT = 0.5 * math.log(2 * math.pi)


def mixture(n: int, generator: torch.Generator) -> Tensor:
    """Points `(n, 1, 1, 2)` about (2, 2), (2, -2), (-2, 2), (-2, -2), each with a standard deviation of 0.3."""
    means = 4.0 * torch.randint(0, 2, (n, 2), generator=generator) - 2
    return (means + 0.3 * torch.randn(n, 2, generator=generator)).reshape(n, 1, 1, 2)


def mixture_nll(x: Tensor) -> Tensor:
    """Nats `(n,)` of points `(n, 1, 1, 2)` under their own law; the mean is 1.816."""
    two = torch.distributions.Normal(torch.tensor([-2.0, 2.0]), 0.3).log_prob(x.flatten(1)[..., None])
    return -(two.logsumexp(-1) - math.log(2)).sum(1)


def gaussian(n: int, generator: torch.Generator) -> Tensor:
    """Images `(n, 1, 2, 2)` of independent unit normal numbers."""
    return torch.randn(n, 1, 2, 2, generator=generator)


@dataclass(frozen=True)
class Clips:
    """Clips of one number a frame, Gaussian with covariance `rho^|i - j|`, and what is best under noise on them.

    Args:
        sigma: Standard deviation of the noise.
        frames: Of a clip.
        rho: Correlation of neighbours.
    """

    sigma: float
    frames: int = 21
    rho: float = 0.95

    def covariance(self) -> Tensor:
        """Of clean clips, float64."""
        place = torch.arange(self.frames, dtype=torch.float64)
        return self.rho ** (place[:, None] - place).abs()

    def noisy_covariance(self) -> Tensor:
        """Of noisy clips, float64."""
        return self.covariance() + self.sigma**2 * torch.eye(self.frames, dtype=torch.float64)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Clean clips `(n, T, 1, 1, 1)`."""
        root = torch.linalg.cholesky(self.covariance()).float()
        return (torch.randn(n, self.frames, generator=generator) @ root.T).reshape(n, self.frames, 1, 1, 1)

    def entropy(self) -> float:
        """Of noisy clips, nats a frame."""
        return CONSTANT + 0.5 + float(torch.logdet(self.noisy_covariance())) / (2 * self.frames)

    def nll(self, x: Tensor) -> Tensor:
        """Nats a frame `(n,)` of noisy clips under their own law."""
        law = torch.distributions.MultivariateNormal(x.new_zeros(self.frames), self.noisy_covariance().to(x))
        return -law.log_prob(x.flatten(1)) / self.frames

    def estimator(self, frame: int, last: int, first: int = 0) -> Tensor:
        """Weights `(T,)` of the mean of a clean frame given the noisy frames `first` to `last`, float64."""
        seen = slice(max(first, 0), min(last, self.frames - 1) + 1)
        weights = torch.zeros(self.frames, dtype=torch.float64)
        weights[seen] = torch.linalg.solve(self.noisy_covariance()[seen, seen], self.covariance()[seen, frame])
        return weights

    def error(self, frame: int, last: int, first: int = 0) -> float:
        """Mean squared error of `estimator`."""
        return float(1 - self.estimator(frame, last, first) @ self.covariance()[frame])
