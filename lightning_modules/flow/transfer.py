"""The loss of data-to-data transfer, measured in the features of a network (t = 0 source, t = 1 data)."""

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.lightning_modules.flow.paths import Linear, Path


def feature_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    features: Callable[[Tensor], Tensor],
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    path: Path = Linear(),  # noqa: B008
) -> Tensor:
    """`|J_h(x_t) (dx_t/dt - v(x_t, t))|^2` of each sample `(B,)`, mean over features (arXiv 2209.03003 section 5.3).

    `J_h` is the Jacobian of `features` at `x_t`; it is applied by forward-mode differentiation and no gradient flows
    through `x_t` or `features`. With the identity it is the plain loss.

    Args:
        velocity: Function of states `(B, ...)` and times `(B,)`.
        features: `h`, function of states `(B, ...)` -> `(B, ...)`, rows independent of each other (eval mode).
        x0: Source `(B, ...)` at t = 0.
        x1: Data `(B, ...)` at t = 1.
        t: Times `(B,)`.
        path: The interpolation path.
    """
    x_t = path.interpolate(x0, x1, t)
    residual = path.velocity(x0, x1, t) - velocity(x_t, t)
    _, moved = torch.func.jvp(features, (x_t.detach(),), (residual,))
    return moved.square().flatten(1).mean(1)
