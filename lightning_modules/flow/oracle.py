"""Flows between Gaussian mixtures in closed form, on any path: the truth that solvers and methods are tested with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.lightning_modules.flow.paths import Linear, Path


@dataclass(frozen=True)
class Mixture:
    """Mixture of isotropic Gaussians `sum_k w_k N(m_k, s_k^2 I)`.

    Args:
        means: `(K, D)`.
        stds: `(K,)`.
        weights: `(K,)`, sum 1.

    Raises:
        ValueError: shapes that do not fit together.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __post_init__(self):
        k = len(self.means)
        if self.means.ndim != 2 or self.stds.shape != (k,) or self.weights.shape != (k,):
            raise ValueError(
                f"needs means (K, D), stds (K,), weights (K,), got {tuple(self.means.shape)}, "
                f"{tuple(self.stds.shape)}, {tuple(self.weights.shape)}"
            )

    @classmethod
    def gaussian(cls, mean: Tensor, std: float) -> "Mixture":
        """One Gaussian with mean `(D,)`."""
        return cls(mean[None], mean.new_tensor([std]), mean.new_ones(1))

    @classmethod
    def uniform(cls, means: Tensor, std: float) -> "Mixture":
        """Equal weights and one standard deviation."""
        return cls(means, means.new_full((len(means),), std), means.new_full((len(means),), 1 / len(means)))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws `(n, D)` samples."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=self.means.dtype, generator=generator)
        return self.means[component] + self.stds[component, None] * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density `(B,)` at `(B, D)`."""
        return torch.logsumexp(self.weights.log() + _log_normal(x, self.means, self.stds.square()), dim=1)


class MixtureFlow:
    """The exact flow of independent pairs `x0 ~ source`, `x1 ~ target` (t = 0 source, t = 1 target).

    `x_t` is a mixture over all pairs of components (i, j): mean `alpha m_j + sigma a_i`, variance
    `alpha^2 s_j^2 + sigma^2 r_i^2`. Given the pair all conditional means are linear in `x_t`; posterior weights of the
    pairs combine them. States are `(B, D)`, times `(B,)`.

    Args:
        target: law of the data.
        source: law of the noise; the standard Gaussian by default.
        path: the interpolation path.
    """

    def __init__(self, target: Mixture, source: Mixture | None = None, path: Path = Linear()):  # noqa: B008
        self.target, self.path = target, path
        self.source = Mixture.gaussian(torch.zeros_like(target.means[0]), 1.0) if source is None else source

    def _posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log p_t `(B,)`; E[x1|x], E[x0|x], score, each `(B, D)`."""
        alpha, sigma = self.path.alpha(t)[:, None, None], self.path.sigma(t)[:, None, None]
        a, r2 = self.source.means[:, None], self.source.stds.square()[:, None]
        m, s2 = self.target.means[None], self.target.stds.square()[None]
        variance = (alpha**2 * s2 + sigma**2 * r2).flatten(1)[..., None]
        mean = (alpha[..., None] * m + sigma[..., None] * a).flatten(1, 2)
        residual = (x[:, None] - mean) / variance
        log_weight = (self.source.weights[:, None] * self.target.weights[None]).log().flatten()
        joint = log_weight + _log_normal(x, mean, variance[..., 0])
        share = torch.softmax(joint, dim=1)[..., None]
        pairs = (len(self.source.means), len(self.target.means))
        gain1 = (alpha * s2.expand(pairs)).flatten(1)[..., None]
        gain0 = (sigma * r2.expand(pairs)).flatten(1)[..., None]
        x1 = (share * (m.expand(*pairs, -1).flatten(0, 1) + gain1 * residual)).sum(1)
        x0 = (share * (a.expand(*pairs, -1).flatten(0, 1) + gain0 * residual)).sum(1)
        return torch.logsumexp(joint, dim=1), x1, x0, -(share * residual).sum(1)

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """`log p_t(x)` `(B,)`."""
        return self._posterior(x, t)[0]

    def data(self, x: Tensor, t: Tensor) -> Tensor:
        """`E[x1 | x_t = x]`."""
        return self._posterior(x, t)[1]

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """`E[x0 | x_t = x]`."""
        return self._posterior(x, t)[2]

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """`grad log p_t(x)`, the source being any mixture."""
        return self._posterior(x, t)[3]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """`E[dx_t/dt | x_t = x]`: the minimiser of the flow-matching loss."""
        _, x1, x0, _ = self._posterior(x, t)
        return self.path.d_alpha(t)[:, None] * x1 + self.path.d_sigma(t)[:, None] * x0

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Moves states from times `t` to `s` exactly: `mean_s + (std_s / std_t) (x - mean_t)`.

        Raises:
            ValueError: source or target have more than one component.
        """
        if len(self.source.means) > 1 or len(self.target.means) > 1:
            raise ValueError("the flow map is in closed form only between single Gaussians")
        mean_t, std_t = self._moments(t)
        mean_s, std_s = self._moments(s)
        return mean_s + std_s / std_t * (x - mean_t)

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        mean = alpha * self.target.means + sigma * self.source.means
        return mean, (alpha**2 * self.target.stds**2 + sigma**2 * self.source.stds**2).sqrt()


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log densities `(B, K)` of `(B, D)` under isotropic Gaussians with mean `(..., K, D)` and variance `(..., K)`."""
    distance = (x[:, None] - mean).square().sum(-1)
    return -0.5 * (distance / variance + x.shape[1] * (variance.log() + math.log(2 * math.pi)))
