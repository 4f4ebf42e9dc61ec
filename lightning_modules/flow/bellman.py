"""Bellman-optimal step sizes for Euler's method (arXiv 2312.16414); t = 0 noise, t = 1 data, any monotone times.

The fine grid has K_max steps, times `t_0 .. t_K_max`; a schedule is a list of K + 1 indices from 0 to K_max.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from penstock.lightning_modules.flow.losses import Reduction, squared_error
from penstock.lightning_modules.flow.packed import PackedRows
from penstock.lightning_modules.flow.paths import expand

Velocity = Callable[[Tensor, Tensor], Tensor]
COLUMNS = 1024  # of the rows that are turned into float64 at once
EXACT = 20 * 2**20  # bytes


def gram(rows: Tensor) -> Tensor:
    """Inner products `(R, R)` of rows `(R, M)`, summed in float64 piece by piece, whatever the dtype of the rows."""
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for piece in rows.split(COLUMNS, dim=1):
        piece = piece.double()
        total.addmm_(piece, piece.T)
    return total


class CostSums:
    """The cost matrix of eq. 5, from batches of starting states that are followed one after the other.

    With `v_l` the velocity at the l-th state of the fine Euler trajectory and `d_l = v_{l+1} - v_l`, one large step
    from `t_i` misses the fine trajectory at `t_j` by

        x_i + (t_j - t_i) v_i - x_j = - sum_{l=i}^{j-2} (t_j - t_{l+1}) d_l,

    so that all costs follow from the Gram matrix `Q_lm = sum_n <d_l^n, d_m^n>`. No state is kept, a batch's differences
    are dropped after it, and what cancels in the formula has cancelled before it is squared: a straight trajectory
    costs exactly 0. Differences in float32 that would take more than `EXACT` bytes wait for the end of their batch in 4
    bits a number, see `packed`.

    Args:
        times: `t_0 .. t_K_max`, strictly ascending or descending (noise levels), at least two.

    Raises:
        ValueError: times that are not strictly monotone.
    """

    def __init__(self, times: Tensor):
        steps = times.double().diff()
        if times.ndim != 1 or len(times) < 2 or not bool((steps > 0).all() or (steps < 0).all()):
            raise ValueError("the times of a fine grid must be 1-D, at least two, and strictly ascend or descend")
        self.times = times.double().cpu()
        self.gram: Tensor | None = None
        self.n = 0

    @torch.no_grad()
    def follow(self, velocity: Velocity, x: Tensor) -> Tensor:
        """Adds a batch; returns its states at the last time.

        Args:
            velocity: `dx/dt` of states `(B, ...)` and times `(B,)`.
            x: states at the first time, `(B, ...)`.
        """
        times = self.times.tolist()
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        rows, columns, before = len(times) - 2, x.numel(), None
        exact = dtype == torch.float64 or 4 * rows * columns <= EXACT
        differences = x.new_empty(rows, columns, dtype=dtype) if exact else PackedRows(rows, columns, x.device)
        for i, (t, s) in enumerate(pairwise(times)):
            v = velocity(x, torch.full((len(x),), t, dtype=dtype, device=x.device))
            flat = v.flatten().to(dtype)
            if before is not None:
                differences[i - 1] = flat - before
            before = flat
            x = x + (s - t) * v
        found = gram(differences) if exact else differences.gram()
        self.gram, self.n = found if self.gram is None else self.gram.add_(found), self.n + len(x)
        return x

    def matrix(self) -> Tensor:
        """`c` `(K_max + 1, K_max + 1)`, float64 on the CPU, strictly upper triangular.

        `c[i, j] = mean_n |x_i + (t_j - t_i) v_i - x_j|^2`, the sum of squares over a sample's dimensions.

        Raises:
            ValueError: no batch was followed, or one held a number that is not finite.
        """
        if self.gram is None:
            raise ValueError("no batch was followed")
        q, t = self.gram.cpu() / self.n, self.times
        if not bool(q.isfinite().all()):
            raise ValueError("the velocity is not finite on the fine grid")
        c = torch.zeros(len(t), len(t), dtype=torch.float64)
        for j in range(2, len(t)):
            w = t[j] - t[1:j]
            block = (w[:, None] * w * q[: j - 1, : j - 1]).flip(0, 1)
            c[: j - 1, j] = block.cumsum(0).cumsum(1).diagonal().flip(0).clamp(min=0)
        return c


def cost_matrix(velocity: Velocity, x: Tensor, times: Tensor, batch: int | None = None) -> Tensor:
    """`CostSums` over starting states `(N, ...)`, `batch` at a time (all at once by default)."""
    sums = CostSums(times)
    for part in x.split(batch or len(x)):
        sums.follow(velocity, part)
    return sums.matrix()


@dataclass(frozen=True)
class Schedules:
    """The best schedules of every length: dynamic programming with exactly k edges (eq. 6-8), all k in one table.

    `V(i, 1) = c[i, K_max]`, `V(i, k) = min_{i<j<K_max} c[i, j] + V(j, k - 1)`; among equals the smallest j.

    Attributes:
        costs: the cost matrix.
        value: `(K_max, K_max)`, `value[k - 1, i] = V(i, k)`, infinite where fewer than k nodes follow i.
        choice: int64, same shape: the j that attains it.
    """

    costs: Tensor
    value: Tensor
    choice: Tensor

    @property
    def k_max(self) -> int:
        """Steps of the fine grid."""
        return len(self.value)

    def cost(self, k: int) -> float:
        """Total cost of the best schedule of k steps."""
        return float(self.value[self._check(k) - 1, 0])

    def path(self, k: int) -> list[int]:
        """Its k + 1 indices."""
        nodes = [0]
        for row in range(self._check(k) - 1, 0, -1):
            nodes.append(int(self.choice[row, nodes[-1]]))
        return [*nodes, self.k_max]

    def _check(self, k: int) -> int:
        if not 1 <= k <= self.k_max:
            raise ValueError(f"K={k} steps out of a fine grid of K_max={self.k_max}: expected 1 to {self.k_max}")
        return k


def schedules(costs: Tensor) -> Schedules:
    """The best schedules for all k from costs `(K_max + 1, K_max + 1)`, of which the strict upper triangle is read."""
    k_max = len(costs) - 1
    inner = costs.double()[:k_max, :k_max]
    steps = inner.masked_fill(torch.ones_like(inner, dtype=torch.bool).tril(), torch.inf)
    value, choice = [costs.double()[:k_max, k_max]], [torch.full((k_max,), k_max)]
    for _ in range(k_max - 1):
        total = steps + value[-1]
        choice.append(total.argmin(1))
        value.append(total.gather(1, choice[-1][:, None])[:, 0])
    return Schedules(costs, torch.stack(value), torch.stack(choice))


def path_cost(costs: Tensor, indices: list[int]) -> float:
    """Sum of the costs along a schedule."""
    return float(costs[indices[:-1], indices[1:]].sum())


def uniform_indices(k: int, k_max: int) -> list[int]:
    """Equal steps, rounded to the fine grid.

    Raises:
        ValueError: k outside of 1 to k_max.
    """
    if not 1 <= k <= k_max:
        raise ValueError(f"K={k} steps out of a fine grid of K_max={k_max}: expected 1 to {k_max}")
    return [round(r * k_max / k) for r in range(k + 1)]


def straightening_loss(
    velocity: Velocity, x: Tensor, y: Tensor, t: Tensor, s: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """`|v(x, t) - (y - x) / (s - t)|^2` of each sample `(B,)` (eq. 9, one segment of a teacher's trajectory a sample).

    Args:
        velocity: function of states `(B, ...)` and times `(B,)`.
        x: the teacher's states at `t`, `(B, ...)`.
        y: its states at `s`, shape of `x`.
        t: starts of the segments `(B,)`.
        s: their ends `(B,)`, other than `t`.
        reduction: over a sample's dimensions, see `losses.squared_error`.
    """
    return squared_error(velocity(x, t), (y - x) / expand(s - t, x), reduction)
