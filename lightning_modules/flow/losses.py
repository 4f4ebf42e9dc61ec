"""Regression losses of flows, one number per sample (t = 0 noise, t = 1 data)."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from penstock.lightning_modules.flow.paths import Linear, Path

Reduction = Literal["mean", "half_sum"]


def squared_error(prediction: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared error of each sample `(B,)`.

    Args:
        prediction: `(B, ...)`.
        target: shape of `prediction`.
        reduction: `mean` over the dimensions, or `half_sum`, half of the sum over them (a Gaussian log-likelihood).

    Raises:
        ValueError: shapes that differ, or an unknown reduction.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    squares = (prediction - target).square().flatten(1)
    if reduction == "mean":
        return squares.mean(1)
    if reduction == "half_sum":
        return 0.5 * squares.sum(1)
    raise ValueError(f"unknown reduction {reduction!r}: expected mean or half_sum")


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    path: Path = Linear(),  # noqa: B008
    reduction: Reduction = "mean",
) -> Tensor:
    """`|v(x_t, t) - dx_t/dt|^2` of each sample `(B,)`: rectified flow (arXiv 2209.03003 eq. 1), flow matching.

    The law of t makes the method: uniform trains or reflows, `times.Fixed(1e-3)` distils to one step (the target is
    still the whole displacement), `times.Grid(k)` to k steps.

    Args:
        velocity: function of states `(B, ...)` and times `(B,)`.
        x0: source, `(B, ...)`, at t = 0.
        x1: data, `(B, ...)`, at t = 1.
        t: times `(B,)`.
        path: the interpolation path.
        reduction: see `squared_error`.
    """
    return squared_error(velocity(path.interpolate(x0, x1, t), t), path.velocity(x0, x1, t), reduction)
