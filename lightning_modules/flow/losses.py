"""Regression losses of flows, one number per sample (t = 0 noise, t = 1 data)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

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


class Regression(NamedTuple):
    """What a flow's loss is computed from.

    Attributes:
        prediction: `v(x_t, t)`, `(B, ...)`.
        target: `dx_t/dt`, shape of `prediction`.
        x_t: state that the network saw.
        x0: source, at t = 0.
        x1: data, at t = 1.
        t: times `(B,)`.
    """

    prediction: Tensor
    target: Tensor
    x_t: Tensor
    x0: Tensor
    x1: Tensor
    t: Tensor


class FlowLoss(ABC):
    """What a predicted velocity costs. Not a module: networks that judge are frozen and stay out of checkpoints."""

    def prepare(self) -> None:
        """Loads what the loss needs, before the first batch. Raises `UserError` where a file is missing or wrong."""
        return None

    @abstractmethod
    def __call__(self, r: Regression) -> Tensor:
        """Loss of each sample `(B,)`, 0 where the prediction is the target."""


@dataclass(frozen=True)
class SquaredError(FlowLoss):
    """`|v - dx_t/dt|^2` (arXiv 2209.03003 eq. 1).

    Args:
        reduction: Over a sample's dimensions, see `squared_error`.
    """

    reduction: Reduction = "mean"

    def __call__(self, r: Regression) -> Tensor:
        return squared_error(r.prediction, r.target, self.reduction)


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    path: Path = Linear(),  # noqa: B008
    loss: FlowLoss = SquaredError(),
) -> Tensor:
    """Loss of `v(x_t, t)` against `dx_t/dt` of each sample `(B,)`: rectified flow (arXiv 2209.03003 eq. 1).

    The law of t makes the method: uniform trains or reflows, `times.Fixed(1e-3)` distils to one step (the target is
    still the whole displacement), `times.Grid(k)` to k steps.

    Args:
        velocity: function of states `(B, ...)` and times `(B,)`.
        x0: source, `(B, ...)`, at t = 0.
        x1: data, `(B, ...)`, at t = 1.
        t: times `(B,)`.
        path: the interpolation path.
        loss: what a prediction costs.
    """
    x_t = path.interpolate(x0, x1, t)
    return loss(Regression(velocity(x_t, t), path.velocity(x0, x1, t), x_t, x0, x1, t))
