"""What a network predicts, and how to turn one prediction into another (t = 0 noise, t = 1 data).

With `D = E[x1 | x_t]` and `eps = E[x0 | x_t]`, `x_t = alpha D + sigma eps`:

| prediction | definition |
|---|---|
| velocity | `alpha' D + sigma' eps` |
| score | `-eps / sigma` |
| noise | `eps` |
| data | `D` |
| v | `alpha eps - sigma D` (arXiv 2202.00512) |
"""

from typing import Literal

import torch
from torch import Tensor

from penstock.lightning_modules.flow.paths import Path, expand

Prediction = Literal["velocity", "score", "noise", "data", "v"]
PREDICTIONS: tuple[Prediction, ...] = ("velocity", "score", "noise", "data", "v")


def to_data(prediction: Tensor, kind: Prediction, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """`D = E[x1 | x_t]` from a prediction of `kind`.

    Args:
        prediction: network output, shape of `x`.
        kind: what the output means.
        x: state `x_t`, `(B, ...)`.
        t: times `(B,)`; 0 noise, 1 data. `noise` and `score` need alpha(t) > 0.
        path: the interpolation path.

    Raises:
        ValueError: unknown `kind`.
    """
    alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
    match kind:
        case "data":
            return prediction
        case "noise":
            return (x - sigma * prediction) / alpha
        case "score":
            return (x + sigma.square() * prediction) / alpha
        case "v":
            return (alpha * x - sigma * prediction) / (alpha.square() + sigma.square())
        case "velocity":
            d_alpha, d_sigma = expand(path.d_alpha(t), x), expand(path.d_sigma(t), x)
            return (sigma * prediction - d_sigma * x) / (d_alpha * sigma - d_sigma * alpha)
    raise _unknown(kind)


def to_noise(prediction: Tensor, kind: Prediction, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """`eps = E[x0 | x_t]` from a prediction of `kind`; arguments as `to_data`, `data` needs sigma(t) > 0.

    Raises:
        ValueError: unknown `kind`.
    """
    alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
    match kind:
        case "noise":
            return prediction
        case "score":
            return -sigma * prediction
        case "data":
            return (x - alpha * prediction) / sigma
        case "v":
            return (sigma * x + alpha * prediction) / (alpha.square() + sigma.square())
        case "velocity":
            d_alpha, d_sigma = expand(path.d_alpha(t), x), expand(path.d_sigma(t), x)
            return (d_alpha * x - alpha * prediction) / (d_alpha * sigma - d_sigma * alpha)
    raise _unknown(kind)


def convert(prediction: Tensor, source: Prediction, target: Prediction, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """Turns a prediction of kind `source` into one of kind `target`; other arguments as `to_data`.

    Raises:
        ValueError: unknown `source` or `target`.
    """
    for kind in (source, target):
        if kind not in PREDICTIONS:
            raise _unknown(kind)
    if source == target:
        return prediction
    args = (prediction, source, x, t, path)
    match target:
        case "data":
            return to_data(*args)
        case "noise":
            return to_noise(*args)
        case "score":
            return -to_noise(*args) / expand(path.sigma(t), x)
        case "v":
            return expand(path.alpha(t), x) * to_noise(*args) - expand(path.sigma(t), x) * to_data(*args)
        case "velocity":
            return expand(path.d_alpha(t), x) * to_data(*args) + expand(path.d_sigma(t), x) * to_noise(*args)


def error_ratio(kind: Prediction, t: Tensor, path: Path) -> Tensor:
    """`c(t)` with `|error of kind|^2 = c(t) |error of data|^2`, at the same `x_t`; t of any shape.

    A loss with weight `w` on the data error equals one with weight `w / error_ratio(kind)` on the error of `kind`.

    Raises:
        ValueError: unknown `kind`.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    match kind:
        case "data":
            return torch.ones_like(t)
        case "noise":
            return (alpha / sigma).square()
        case "score":
            return (alpha / sigma.square()).square()
        case "v":
            return ((alpha.square() + sigma.square()) / sigma).square()
        case "velocity":
            return (path.d_alpha(t) - path.d_sigma(t) * alpha / sigma).square()
    raise _unknown(kind)


def snr(t: Tensor, path: Path) -> Tensor:
    """`alpha^2 / sigma^2`."""
    return (path.alpha(t) / path.sigma(t)).square()


def elbo_weight(t: Tensor, path: Path) -> Tensor:
    """Weight on the data error of the continuous variational bound, `(1/2) dSNR/dt` (arXiv 2107.00630 eq. 17)."""
    return snr(t, path) * path.d_half_log_snr(t)


def min_snr_weight(t: Tensor, path: Path, gamma: float = 5.0) -> Tensor:
    """Weight on the data error `min(SNR, gamma)` (arXiv 2303.09556)."""
    return snr(t, path).clamp(max=gamma)


def p2_weight(t: Tensor, path: Path, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """Weight on the data error `SNR / (k + SNR)^gamma` (arXiv 2204.00227 eq. 8)."""
    ratio = snr(t, path)
    return ratio / (k + ratio) ** gamma


def edm_weight(t: Tensor, path: Path, sigma_data: float = 0.5) -> Tensor:
    """Weight on the data error `1/r^2 + 1/sigma_data^2`, `r` the noise-to-data ratio (arXiv 2206.00364 table 1)."""
    return snr(t, path) + 1 / sigma_data**2


def _unknown(kind: str) -> ValueError:
    return ValueError(f"unknown prediction {kind!r}: expected one of {', '.join(PREDICTIONS)}")
