"""Time grids for solvers and the official time map of rectified flow (t = 0 noise, t = 1 data).

Grids are float64 CPU tensors `(steps + 1,)`; they ascend from noise to data, and `grid.flip(0)` encodes.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from penstock.lightning_modules.flow.paths import Path


def uniform(steps: int, start: float = 0.0, stop: float = 1.0) -> Tensor:
    """Equal steps in t from `start` to `stop`.

    Raises:
        ValueError: `steps` below 1 or `start == stop`.
    """
    _check(steps, start, stop)
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64)


def uniform_half_log_snr(steps: int, path: Path, start: float | None = None, stop: float | None = None) -> Tensor:
    """Equal steps in `lambda = log(alpha / sigma)` (arXiv 2206.00927), between two times.

    Args:
        steps: number of steps, at least 1.
        path: the interpolation path.
        start: first time; the lower end of `path.snr_range` by default.
        stop: last time; the upper end of `path.snr_range` by default.

    Raises:
        ValueError: `steps` below 1, equal ends, or an end where lambda is infinite.
    """
    start = path.snr_range[0] if start is None else start
    stop = path.snr_range[1] if stop is None else stop
    _check(steps, start, stop)
    ends = path.half_log_snr(torch.tensor([start, stop], dtype=torch.float64))
    if not bool(ends.isfinite().all()):
        raise ValueError(f"log-SNR is infinite at t={start:g} or t={stop:g}: stay inside {path.snr_range}")
    grid = path.time_at(torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64))
    grid[0], grid[-1] = start, stop
    return grid


def karras(steps: int, path: Path, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0) -> Tensor:
    """Noise levels of arXiv 2206.00364 eq. 5, then 0.

    `sigma_i = (max^(1/rho) + i/(N-1) (min^(1/rho) - max^(1/rho)))^rho`.

    Args:
        steps: number of noise levels N and of steps, at least 1.
        path: the interpolation path; levels are noise-to-data ratios `sigma(t) / alpha(t)`.
        sigma_max: first level; must not exceed the path's ratio at t = 0.
        sigma_min: last positive level, below `sigma_max`.
        rho: bend of the grid, positive.

    Raises:
        ValueError: `steps` below 1, levels out of order or out of the path's reach.
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    place = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (sigma_max ** (1 / rho) + place * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    times = path.time_at(-levels.log())
    if float(times[0]) < -1e-9:
        raise ValueError(f"sigma_max={sigma_max:g} is more noise than {path} has at t=0")
    return torch.cat([times.clamp(min=0), times.new_ones(1)])


def compressed(velocity: Callable[[Tensor, Tensor], Tensor], eps: float = 1e-3) -> Callable[[Tensor, Tensor], Tensor]:
    """Reads `velocity(x, t)` at `eps + (1 - eps) t` while the solver's clock still runs over [0, 1].

    With `Euler` on `uniform(N)` this is the sampler that the rectified-flow checkpoints were evaluated with: steps of
    1/N, network times in [eps, 1) (arXiv 2209.03003, official implementation).
    """
    return lambda x, t: velocity(x, eps + (1 - eps) * t)


def check_grid(grid: Tensor) -> list[float]:
    """The times of a grid as numbers.

    Raises:
        ValueError: not 1-D, fewer than two times, not strictly monotone, or outside of [0, 1].
    """
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"a grid is a 1-D tensor of at least two times, got shape {tuple(grid.shape)}")
    times = grid.tolist()
    if not (all(a < b for a, b in pairwise(times)) or all(a > b for a, b in pairwise(times))):
        raise ValueError("the times of a grid must strictly ascend (noise to data) or descend (data to noise)")
    if min(times) < 0 or max(times) > 1:
        raise ValueError(f"the times of a grid must lie in [0, 1], got {min(times):g} to {max(times):g}")
    return times


def _check(steps: int, start: float, stop: float) -> None:
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}")
    if math.isclose(start, stop):
        raise ValueError(f"a grid needs two different ends, got {start} and {stop}")
