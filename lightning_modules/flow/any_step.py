"""Average velocities `u(x, t, r)`: what carries a state from t to r > t in one step (t = 0 noise, t = 1 data).

The papers (arXiv 2512.05150, arXiv 2505.07447) count the other way: their time is `1 - t`, their `F` is `-u`, and their
negative times, at which the network predicts the velocity of its own samples, are `t` in (1, 2] here: the clock runs
through the data and back to the noise of the twin. `noise_share` is the share of noise on both sides.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from penstock.lightning_modules.flow.paths import expand

Average = Callable[[Tensor, Tensor, Tensor], Tensor]
STEP = 0.01


def noise_share(t: Tensor) -> Tensor:
    """`|1 - t|`: the factor of the noise in `x_t`, for t in [0, 2]."""
    return (1 - t).abs()


def mix(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """`x_t = |1 - t| x0 + (1 - |1 - t|) x1` for noise and data `(B, ...)` and times `(B,)` in [0, 2]."""
    share = expand(noise_share(t), x1)
    return share * x0 + (1 - share) * x1


def ends(x: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and data that a velocity points from and to: `x0 = x - (1 - s) u`, `x1 = x + s u`, s the share of noise.

    Args:
        x: States `(B, ...)`.
        u: Velocities, shape of `x`.
        t: Times `(B,)` in [0, 2].

    Returns:
        `x0` and `x1`, shape of `x`: `s x0 + (1 - s) x1 = x` and `x1 - x0 = u`.
    """
    share = expand(noise_share(t), x)
    return x - (1 - share) * u, x + share * u


def displacement(average: Average, x: Tensor, t: Tensor, r: Tensor, order: int) -> Tensor:
    """What `order` equal steps from t to r add to `x` `(B, ...)`: the sum in eq. 5 of arXiv 2512.05150.

    Args:
        average: `u(x, t, r)`.
        x: States at t.
        t: Times `(B,)`.
        r: Times `(B,)`, at least t.
        order: N, the number of steps, at least 1.
    """
    total = torch.zeros_like(x)
    grid = [t * (1 - i / order) + r * (i / order) for i in range(order + 1)]
    for now, then in pairwise(grid):
        step = expand(then - now, x) * average(x, now, then)
        x, total = x + step, total + step
    return total


def rcgm_target(
    average: Average,
    u: Tensor,
    velocity: Tensor,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    order: int,
    step: float = STEP,
) -> Tensor:
    """Regression target of any-step training, recursive consistent generation of order N (arXiv 2512.05150 eq. 5).

    The residual `g = ((r - t) u - P) / D - v` compares the step from t to r with one that follows `v` for `D = step`
    and then N steps to r, `P`. Without the first part (`step = 0`) it is `g = u - P / (r - t)`: two steps have to do
    what one does, a shortcut model (arXiv 2410.12557). Where r is nearer than D (0.01, if that is 0), it is
    `u - v`, which is flow matching. The target is `u - clamp(g, -1, 1)`: with the squared error the gradient is that
    of `g du`.

    Args:
        average: `u(x, t, r)` of the network that gives targets; its gradient is not used.
        u: The network's prediction at `x, t, r` `(B, ...)`.
        velocity: `v`, the velocity (with guidance in it, if wanted) at `x, t`.
        x: States `(B, ...)` at t.
        t: Times `(B,)` in [0, 1].
        r: Times `(B,)` in [t, 1].
        order: N, at least 1: 1 is a consistency model (r = 1) or MeanFlow's condition (any r), 2 is TwinFlow's.
        step: D, in [0, 1).

    Returns:
        The target without gradient, shape of `u`.

    Raises:
        ValueError: an order below 1; an order below 2 without a first step, whose target is the prediction itself.
    """
    least = 1 if step else 2
    if order < least:
        why = "order 0 is the velocity itself" if step else "one step compares u with itself"
        raise ValueError(f"rcgm_target: order {order} with step {step}, expected at least {least} ({why})")
    with torch.no_grad():
        p = displacement(average, x + step * velocity, torch.minimum(t + step, r), r, order)
        gap = r - t
        near = expand(gap < (step or STEP), u) > 0
        size = expand(gap / step, u) if step else 1
        far = size * u - p / (step or expand(gap, u)) - (velocity if step else 0)
        return u - torch.where(near, u - velocity, far).clamp(-1, 1)


def time_weight(t: Tensor, r: Tensor) -> Tensor:
    """`tan((1 - (r - t)) pi / 2.5) + 1` `(B,)`: 4.08 at r = t, 1 for the whole way (official code)."""
    return torch.tan((1 - (r - t)) * (math.pi / 2.5)) + 1
