"""Samplers of 2-rectified flow++ (arXiv 2405.20320 section 5) and of its teacher (t = 0 noise, t = 1 data).

The paper's time is `t_paper = 1 - t`. These solvers keep their own distance from the ends of [0, 1]: they are given
the whole grid.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from penstock.lightning_modules.flow.grids import check_grid, karras
from penstock.lightning_modules.flow.paths import Linear, expand
from penstock.lightning_modules.flow.solvers import (
    DDIM,
    EDMHeun,
    Solver,
    _GridSolver,
    _normal,
)


class _Anchored(_GridSolver):
    """Moves the first time off the end of the interval, and the state with it, then steps."""

    needs_path: ClassVar[bool] = True
    own_ends: ClassVar[bool] = True
    update: Literal["new", "default"]
    margin: float
    inversion: float

    def __post_init__(self):
        for name in ("margin", "inversion"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}.{name} must be in (0, 1), got {getattr(self, name)}")

    def solve(self, velocity, x, times, path, generator, trajectory):
        if not isinstance(path, Linear):
            raise ValueError(f"{type(self).__name__} steps along the straight line, not along {path}")
        if self.update == "new" and self.margin < times[0] < times[-1]:
            raise ValueError(
                f"{type(self).__name__} anchors at the noise: start at t=0, not {times[0]:g}, or use default"
            )
        if times[0] < min(times[-1], self.margin):
            times[0], x = self.margin, (1 - self.margin) * x
        elif times[0] > max(times[-1], 1 - self.inversion):
            times[0], x = 1 - self.inversion, (1 - self.inversion) * x + self.inversion * _normal(x, generator)
        moved = check_grid(torch.tensor(times, dtype=torch.float64))
        return super().solve(velocity, x, moved, path, generator, trajectory)

    def _step(self, x: Tensor, v: Tensor, t: float, s: float, noise: Tensor) -> Tensor:
        """From time t to s by velocity `v`; only towards the data is there an anchor."""
        if self.update == "default" or s < t:
            return x + (s - t) * v
        return s * (x + (1 - t) * v) + (1 - s) * noise


@dataclass(frozen=True)
class AnchoredEuler(_Anchored):
    """`x <- s D + (1 - s) x0` with `D = x + (1 - t) v(x, t)` and `x0` the noise that was started from: one call a step.

    The `new` update rule; the same as Euler in one step, and in any number where the path is straight. Backwards
    (inversion) the steps are plain Euler.

    Args:
        update: the paper's `new` rule, or its `default`, Euler.
        margin: first time of sampling; the starting noise is scaled by `1 - margin`.
        inversion: share of fresh noise that is mixed into the data before it is carried back, from `1 - inversion`.
    """

    update: Literal["new", "default"] = "new"
    margin: float = 1e-5
    inversion: float = 1e-3

    def _states(self, velocity, x, times, path, generator):
        noise = x
        for t, s in pairwise(times):
            x = self._step(x, velocity(x, t), t, s, noise)
            yield x


@dataclass(frozen=True)
class AnchoredHeun(_Anchored):
    """Heun whose prediction and correction are steps of `AnchoredEuler`; the last step is one of Euler.

    N steps make 2N - 1 calls, the paper's NFE. The correction uses the mean of both velocities from the present state.

    Args:
        update: the paper's `new` rule, or its `default`.
        margin: first time of sampling; the starting noise is scaled by `1 - margin`.
        inversion: share of fresh noise that is mixed into the data before it is carried back, from `1 - inversion`.
    """

    update: Literal["new", "default"] = "new"
    margin: float = 1e-5
    inversion: float = 1e-3

    def _states(self, velocity, x, times, path, generator):
        noise = x
        for t, s in pairwise(times):
            v = velocity(x, t)
            if s != times[-1]:
                v = (v + velocity(self._step(x, v, t, s, noise), s)) / 2
            x = self._step(x, v, t, s, noise)
            yield x


@dataclass(frozen=True)
class EDMSampler(Solver):
    """The deterministic sampler of EDM (arXiv 2206.00364 algorithm 1) on any path: it makes the pairs for one reflow.

    Steps in the noise-to-data ratio from `sigma_max` to `sigma_min` by eq. 5, then to 0. It only counts the steps of
    the grid it is given: N = 18 (35 calls) for CIFAR-10, N = 40 (79) for ImageNet-64. The state at the first level is
    noise alone, of the standard deviation `sigma_max` in units of the data.

    Args:
        order: 2 is Heun (2N - 1 calls), 1 is Euler (N calls).
        sigma_max: first level; the path must have it.
        sigma_min: last positive level.
        rho: bend of the levels.
    """

    needs_path: ClassVar[bool] = True
    own_ends: ClassVar[bool] = True
    order: Literal[1, 2] = 2
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    rho: float = 7.0

    def solve(self, velocity, x, times, path, generator, trajectory):
        if times[-1] < times[0]:
            raise ValueError("EDMSampler only runs from noise to data: invert with heun, rk45 or edm_heun")
        levels = karras(len(times) - 1, path, self.sigma_max, self.sigma_min, self.rho)
        noise = x / path.source_std
        start = expand(path.sigma(levels[:1]).to(x.device), x) * noise
        solver = EDMHeun() if self.order == 2 else DDIM()
        return solver(velocity, start, levels, path=path, generator=generator, trajectory=trajectory)


def mean_straightness(trajectory: Tensor) -> Tensor:
    """Mean over steps and dimensions of `(v_i - (x1 - x0))^2`, `v_i = N (x_{i+1} - x_i)`, per sample `(B,)`.

    0 for straight paths. Unlike `straightness.straightness` it is a mean over dimensions and asks no velocity.

    Args:
        trajectory: states of N equal steps, `(N + 1, B, ...)`.
    """
    velocities = trajectory.diff(dim=0) * (len(trajectory) - 1)
    return (velocities - (trajectory[-1] - trajectory[0])).square().flatten(2).mean((0, 2))


def slerp(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Along the great circle from noise `x` to noise `y`, both of any one shape: `(K, *x.shape)`.

    The angle is the official one, 1e-8 too wide, which makes equal ends harmless.

    Args:
        x: answer at weight 0.
        y: answer at weight 1.
        weight: `(K,)`.
    """
    cosine = (x * y).sum() / (x.norm() * y.norm())
    angle = cosine.clamp(-1, 1).acos() + 1e-8
    w = weight.reshape(-1, *[1] * x.ndim)
    return (torch.sin((1 - w) * angle) * x + torch.sin(w * angle) * y) / torch.sin(angle)
