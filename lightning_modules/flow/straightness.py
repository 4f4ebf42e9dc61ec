"""How straight a flow is and what it costs (t = 0 noise, t = 1 data), arXiv 2209.03003 sections 2.2 and 3.

All values are per sample `(B,)`, summed over dimensions; average over the batch for the expectation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.lightning_modules.flow.losses import SquaredError, flow_matching_loss
from penstock.lightning_modules.flow.solvers import Euler, Solver, Velocity


def straightness(velocity: Velocity, x0: Tensor, grid: Tensor, *, solver: Solver = Euler()) -> tuple[Tensor, Tensor]:  # noqa: B008
    """`S = int |z1 - z0 - v(z_t, t)|^2 dt` along the flow of `x0`, by the left rule on `grid`.

    Args:
        velocity: function of states `(B, ...)` and times `(B,)`.
        x0: states at `grid[0]`, `(B, ...)`.
        grid: ascending times from 0 to 1.
        solver: how to follow the flow; with `Euler` this is the discrete S of an Euler sampler, 0 for one step.

    Returns:
        `S` `(B,)` and the end points `z1`, shape of `x0`.
    """
    states = solver(velocity, x0, grid, trajectory=True).trajectory
    displacement = states[-1] - states[0]
    total = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    times = grid.tolist()
    for state, t, s in zip(states, times, times[1:]):
        v = velocity(state, torch.full((len(x0),), t, dtype=x0.dtype, device=x0.device))
        total = total + (s - t) * (displacement - v).square().flatten(1).sum(1)
    return total, states[-1]


def crossing(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """`|x1 - x0 - v(x_t, t)|^2` on the linear path: with `t ~ U(0, 1)` and the optimal v its mean is `V(X)`.

    With any other velocity the mean is an upper bound of V. Zero means that the interpolation paths do not cross.
    """
    return 2 * flow_matching_loss(velocity, x0, x1, t, loss=SquaredError("half_sum"))


def transport_cost(x0: Tensor, x1: Tensor, p: float = 2.0) -> Tensor:
    """`|x1 - x0|^p` of the pairs, Euclidean norm over all dimensions."""
    return (x1 - x0).flatten(1).norm(dim=1).pow(p)


class CostIdentity(NamedTuple):
    """Both sides of `E|X1-X0|^2 - E|Z1-Z0|^2 = S(Z) + V(X)`, each a scalar tensor."""

    cost_before: Tensor
    cost_after: Tensor
    straightness: Tensor
    crossing: Tensor

    @property
    def gap(self) -> Tensor:
        """Left side minus right side: 0 for the optimal velocity, up to sampling and step size."""
        return self.cost_before - self.cost_after - self.straightness - self.crossing


def cost_identity(
    velocity: Velocity,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    grid: Tensor,
    *,
    solver: Solver = Euler(),  # noqa: B008
) -> CostIdentity:
    """Estimates the four terms of the cost identity on one batch of pairs (arXiv 2209.03003 theorem 3.5 and 3.7).

    Args:
        velocity: the optimal velocity of the coupling, or a fit of it.
        x0: source, `(B, ...)`.
        x1: data paired with it.
        t: times `(B,)`, uniform on (0, 1), for V.
        grid: ascending times from 0 to 1, for S.
        solver: how to follow the flow.
    """
    s, z1 = straightness(velocity, x0, grid, solver=solver)
    return CostIdentity(
        transport_cost(x0, x1).mean(),
        transport_cost(x0, z1).mean(),
        s.mean(),
        crossing(velocity, x0, x1, t).mean(),
    )
