"""Autoregressive affine flows (TARFlow, arXiv 2412.06329; STARFlow, arXiv 2506.06276): guidance and likelihood.

Data `u` become noise `z = (u - mu) / sigma` with `log |det dz/du| = -sum log sigma`, token by token; there is no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Guidance(Protocol):
    """Makes one law of a token out of the conditional and the unconditional one."""

    def __call__(
        self, mu_c: Tensor, sigma_c: Tensor, mu_u: Tensor, sigma_u: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`mu` and `sigma` `(B, n, C)`; `place` `(n,)` is the share of the sequence that ends
        there, in (0, 1]."""
        ...


@dataclass(frozen=True)
class ScoreGuidance:
    """The Gaussian whose score is `(1 + w) score_c - w score_u` (arXiv 2506.06276 proposition 2).

    `s = min(sigma_c / sigma_u, 1)^2`, `d = 1 + w - w s`, `mu = ((1 + w) mu_c - w s mu_u) / d`,
    `sigma = sigma_c / sqrt(d)`.

    Args:
        weight: w, at least 0.

    Raises:
        ValueError: a negative weight.
    """

    weight: float

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"guidance: weight={self.weight}, expected 0 or more")

    def __call__(
        self, mu_c: Tensor, sigma_c: Tensor, mu_u: Tensor, sigma_u: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        w, s = self.weight, (sigma_c / sigma_u).clamp(max=1).square()
        d = 1 + w - w * s
        return ((1 + w) * mu_c - w * s * mu_u) / d, sigma_c / d.sqrt()


@dataclass(frozen=True)
class LinearGuidance:
    """`mu_c + w (mu_c - mu_u)` and `log sigma_c + w (log sigma_c - log sigma_u)` (arXiv 2412.06329).

    Args:
        weight: w, at least 0.
        annealed: w grows from nearly 0 at the first token to its value at the last.
        mean: Whether the mean is guided.
        scale: Whether the scale is guided.

    Raises:
        ValueError: a negative weight.
    """

    weight: float
    annealed: bool = False
    mean: bool = True
    scale: bool = True

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"guidance: weight={self.weight}, expected 0 or more")

    def __call__(
        self, mu_c: Tensor, sigma_c: Tensor, mu_u: Tensor, sigma_u: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        w = self.weight * (place[:, None] if self.annealed else 1.0)
        mu = mu_c + w * (mu_c - mu_u) if self.mean else mu_c
        return mu, sigma_c * (sigma_c / sigma_u) ** w if self.scale else sigma_c


def nll(z: Tensor, logdets: Sequence[Tensor]) -> Tensor:
    """Negative log-likelihood of each sample in nats a dimension `(B,)`, less `log(2 pi) / 2` = 0.9189385.

    Args:
        z: Noise `(B, ...)`.
        logdets: Of each block, unreduced `(B, ...)`.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return 0.5 * wide.square().flatten(1).mean(1) - sum(logdet.flatten(1).mean(1) for logdet in logdets)


def frame_nll(z: Tensor, logdets: Sequence[Tensor]) -> Tensor:
    """`nll` of every frame given those before it `(B, T)`, of a flow that is causal over frames: the chain rule.

    The mean over frames is `nll` of the clip.

    Args:
        z: Noise `(B, T, C, H, W)`.
        logdets: Of each block, unreduced `(B, T, ...)`.
    """
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return 0.5 * wide.square().flatten(2).mean(2) - sum(logdet.flatten(2).mean(2) for logdet in logdets)
