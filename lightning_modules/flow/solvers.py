"""Solvers: one call, `solver(velocity, x, grid, path=..., generator=...) -> Solution` (t = 0 noise, t = 1 data).

`velocity(x, t)` takes states `(B, ...)` and times `(B,)`. An ascending grid generates, a descending one encodes.
Schedules are worked out once in float64 on the CPU: the loops read plain numbers and never wait for the device.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint

from penstock.lightning_modules.flow.grids import check_grid
from penstock.lightning_modules.flow.paths import Linear, Path

Velocity = Callable[[Tensor, Tensor], Tensor]
LINEAR = Linear()


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
        x: the state at the last time of the grid, shape of the start.
        nfe: calls of `velocity`.
        trajectory: states at all times of the grid `(len(grid), B, ...)` if asked for.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None = None


class Solver(ABC):
    """A numerical method for `dx/dt = velocity(x, t)`, or for an SDE with the same marginals.

    Attributes:
        needs_path: uses that x is a noisy state on the path; otherwise the method solves any ODE.
        own_ends: keeps its own distance from t = 0 and t = 1, so that it is given the whole grid from 0 to 1.
    """

    needs_path: ClassVar[bool] = False
    own_ends: ClassVar[bool] = False

    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        grid: Tensor,
        *,
        path: Path = LINEAR,
        generator: torch.Generator | None = None,
        trajectory: bool = False,
    ) -> Solution:
        """Integrates from `grid[0]` to `grid[-1]`.

        Args:
            velocity: function of states `(B, ...)` and times `(B,)`.
            x: state at `grid[0]`, `(B, ...)`.
            grid: strictly monotone times in [0, 1], 1-D, at least two.
            path: the path that `velocity` belongs to; used by solvers that need its coefficients.
            generator: source of randomness of stochastic solvers.
            trajectory: keep the states at all times of the grid.

        Raises:
            ValueError: a bad grid, or one that this solver cannot follow.
        """
        return self.solve(velocity, x, check_grid(grid), path, generator, trajectory)

    @abstractmethod
    def solve(
        self,
        velocity: Velocity,
        x: Tensor,
        times: list[float],
        path: Path,
        generator: torch.Generator | None,
        trajectory: bool,
    ) -> Solution:
        """What a method implements: the same along checked times."""


class _Counted:
    """Calls a velocity at a plain number of a time and counts the calls."""

    def __init__(self, velocity: Velocity):
        self.velocity, self.calls = velocity, 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.calls += 1
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        return self.velocity(x, torch.full((len(x),), t, dtype=dtype, device=x.device))

    def at(self, t: Tensor, x: Tensor) -> Tensor:
        """The same for a time that is a scalar tensor, in the order of arguments of torchdiffeq."""
        self.calls += 1
        return self.velocity(x, t.expand(len(x)))


class _Schedule:
    """The path's coefficients at given times, as plain numbers."""

    def __init__(self, path: Path, times: list[float]):
        t = torch.tensor(times, dtype=torch.float64)
        self.path, self.times = path, times
        self.alpha, self.sigma = path.alpha(t).tolist(), path.sigma(t).tolist()
        self.d_alpha, self.d_sigma = path.d_alpha(t).tolist(), path.d_sigma(t).tolist()
        self.half_log_snr = path.half_log_snr(t).tolist()
        self.ratio = [math.exp(-value) for value in self.half_log_snr]

    def data_and_noise(self, i: int, x: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """`E[x1 | x]` and `E[x0 | x]` at the i-th time."""
        alpha, sigma, d_alpha, d_sigma = self.alpha[i], self.sigma[i], self.d_alpha[i], self.d_sigma[i]
        determinant = d_alpha * sigma - d_sigma * alpha
        if not (math.isfinite(determinant) and determinant > 0):
            raise ValueError(
                f"{self.path} cannot be differentiated at t={self.times[i]:g}: stay in {self.path.t_range}"
            )
        return (sigma * velocity - d_sigma * x) / determinant, (d_alpha * x - alpha * velocity) / determinant


class _GridSolver(Solver):
    """A solver that visits every time of the grid."""

    def solve(self, velocity, x, times, path, generator, trajectory):
        counted = _Counted(velocity)
        state, states = x, [x]
        for state in self._states(counted, x, times, path, generator):
            if trajectory:
                states.append(state)
        return Solution(state, counted.calls, torch.stack(states) if trajectory else None)

    @abstractmethod
    def _states(
        self, velocity: _Counted, x: Tensor, times: list[float], path: Path, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Yields the state after each step."""


@dataclass(frozen=True)
class Euler(_GridSolver):
    """`x <- x + h v(x, t)`: order 1, one call a step."""

    def _states(self, velocity, x, times, path, generator):
        for t, s in pairwise(times):
            x = x + (s - t) * velocity(x, t)
            yield x


@dataclass(frozen=True)
class Heun(_GridSolver):
    """`x <- x + h (v(x, t) + v(x + h v, t + h)) / 2`: order 2, two calls a step."""

    def _states(self, velocity, x, times, path, generator):
        for t, s in pairwise(times):
            slope = velocity(x, t)
            x = x + (s - t) / 2 * (slope + velocity(x + (s - t) * slope, s))
            yield x


@dataclass(frozen=True)
class Midpoint(_GridSolver):
    """`x <- x + h v(x + h v / 2, t + h / 2)`: order 2, two calls a step, never looks at the end of the grid."""

    def _states(self, velocity, x, times, path, generator):
        for t, s in pairwise(times):
            half = x + (s - t) / 2 * velocity(x, t)
            x = x + (s - t) * velocity(half, (t + s) / 2)
            yield x


@dataclass(frozen=True)
class RK45(Solver):
    """Adaptive Dormand-Prince 5(4) over the flattened batch, from `grid[0]` to `grid[-1]`.

    The error norm is an RMS over the whole batch, so that `nfe` depends on the batch. The last step ends exactly at
    `grid[-1]`: the velocity is never asked beyond it. Inner times of the grid only matter to `trajectory`.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance, in units of the state.
        backend: `torchdiffeq` keeps the state on its device, in its dtype, differentiable. `scipy` carries it in
            float64 on the CPU, without gradients: the integrator of the official rectified-flow evaluation, step for
            step. The two choose different steps where a network is rough in t.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    backend: Literal["torchdiffeq", "scipy"] = "torchdiffeq"

    def solve(self, velocity, x, times, path, generator, trajectory):
        wanted = times if trajectory else [times[0], times[-1]]
        counted = _Counted(velocity)
        states = (self._scipy if self.backend == "scipy" else self._torchdiffeq)(counted, x, wanted)
        return Solution(states[-1], counted.calls, states if trajectory else None)

    def _torchdiffeq(self, velocity: _Counted, x: Tensor, times: list[float]) -> Tensor:
        t = torch.tensor(times, dtype=torch.float64, device=x.device)
        options = {"step_t": t[-1:]}
        return odeint(velocity.at, x, t, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)

    @torch.no_grad()
    def _scipy(self, velocity: _Counted, x: Tensor, times: list[float]) -> Tensor:
        def field(t: float, flat: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(flat).to(x.device, x.dtype).reshape(x.shape)
            return velocity(state, t).double().flatten().cpu().numpy()

        start, ends = x.double().flatten().cpu().numpy(), (times[0], times[-1])
        solved = solve_ivp(field, ends, start, method="RK45", t_eval=times, rtol=self.rtol, atol=self.atol)
        if not solved.success:
            raise ValueError(f"RK45 stopped at t={solved.t[-1] if len(solved.t) else times[0]:g}: {solved.message}")
        return torch.from_numpy(solved.y.T.copy()).to(x.device, x.dtype).reshape(-1, *x.shape)


@dataclass(frozen=True)
class DDIM(_GridSolver):
    """Denoising diffusion implicit steps on any path (arXiv 2010.02502 eq. 12).

    `x_s = alpha_s D + sigma_s (sqrt(1 - c^2) eps + c n)`, `c^2 = eta^2 (1 - e^(-2h))`, `h` the rise of
    `lambda = log(alpha / sigma)`, `n` fresh noise. Order 1; `eta = 0` is deterministic and on the linear path the same
    as `Euler`; `eta = 1` has the variance of the ancestral sampler.

    Args:
        eta: share of fresh noise, in [0, 1]; above 0 only towards the data.
    """

    needs_path: ClassVar[bool] = True
    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM.eta must be in [0, 1], got {self.eta}")

    def _states(self, velocity, x, times, path, generator):
        if self.eta > 0 and times[-1] < times[0]:
            raise ValueError("DDIM with eta > 0 only runs from noise to data: use an ascending grid or eta=0")
        at = _Schedule(path, times)
        for i in range(len(times) - 1):
            data, noise = at.data_and_noise(i, x, velocity(x, times[i]))
            if self.eta > 0:
                kept = (at.alpha[i] * at.sigma[i + 1] / (at.alpha[i + 1] * at.sigma[i])) ** 2
                fresh = self.eta**2 * (1 - kept)
                noise = math.sqrt(1 - fresh) * noise + math.sqrt(fresh) * _normal(x, generator)
            x = at.alpha[i + 1] * data + at.sigma[i + 1] * noise
            yield x


@dataclass(frozen=True)
class DPMSolverPP2M(_GridSolver):
    """DPM-Solver++(2M), the second-order multistep method for data prediction (arXiv 2211.01095 algorithm 2).

    `x_s = (sigma_s / sigma_t) x + alpha_s (1 - e^(-h)) (D + (D - D_prev) h / (2 h_prev))`, one call a step. The first
    step, steps from or to an infinite `lambda`, and the last step of a short grid are of order 1.

    Args:
        first_order_below: grids of fewer steps than this take their last step at order 1.
    """

    needs_path: ClassVar[bool] = True
    first_order_below: int = 15

    def _states(self, velocity, x, times, path, generator):
        at = _Schedule(path, times)
        if at.sigma[0] == 0:
            raise ValueError("DPMSolverPP2M cannot leave a state without noise: start the grid before t=1")
        steps, previous, previous_h = len(times) - 1, None, math.inf
        for i in range(steps):
            data, _ = at.data_and_noise(i, x, velocity(x, times[i]))
            h = at.half_log_snr[i + 1] - at.half_log_snr[i]
            estimate = data
            if math.isfinite(h) and i > 0 and (i + 1 < steps or steps >= self.first_order_below):
                estimate = data + (data - previous) * (h / (2 * previous_h))
            shrink = at.sigma[i + 1] / at.sigma[i]
            gain = -at.alpha[i + 1] * math.expm1(-h) if math.isfinite(h) else at.alpha[i + 1] - shrink * at.alpha[i]
            x = shrink * x + gain * estimate
            previous, previous_h = data, h
            yield x


@dataclass(frozen=True)
class EDMHeun(_GridSolver):
    """Heun's method in the noise-to-data ratio, with churn (arXiv 2206.00364 algorithms 1 and 2), on any path.

    In `y = x / alpha` and `n = sigma / alpha` the flow is `dy/dn = eps(x, t)`; steps are Euler with Heun's correction,
    without correction where `n` reaches 0: 2N - 1 calls for N steps that end at t = 1. Order 2.

    Args:
        s_churn: total churn; a step within [s_min, s_max] first adds noise up to `n (1 + min(s_churn/N, sqrt2 - 1))`.
        s_min: smallest ratio that is churned.
        s_max: largest ratio that is churned; churn must not lead beyond the ratio at t = 0.
        s_noise: standard deviation of the added noise.
    """

    needs_path: ClassVar[bool] = True
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self):
        if self.s_churn < 0:
            raise ValueError(f"EDMHeun.s_churn must not be negative, got {self.s_churn}")

    def _states(self, velocity, x, times, path, generator):
        at = _Schedule(path, times)
        if min(at.alpha) <= 0:
            raise ValueError(f"EDMHeun needs alpha > 0 on the whole grid: stay inside {path.snr_range}")
        steps = len(times) - 1
        gain = min(self.s_churn / steps, math.sqrt(2) - 1)
        if gain > 0 and times[-1] < times[0]:
            raise ValueError("EDMHeun with churn only runs from noise to data: use an ascending grid or s_churn=0")
        churned = [n * (1 + gain) if self.s_min <= n <= self.s_max else n for n in at.ratio[:-1]]
        start = _Schedule(path, self._times_at(churned, at, path))
        for i in range(steps):
            y = x / at.alpha[i]
            if churned[i] > at.ratio[i]:
                spread = self.s_noise * math.sqrt(churned[i] ** 2 - at.ratio[i] ** 2)
                y = y + spread * _normal(x, generator)
            state = start.alpha[i] * y
            _, slope = start.data_and_noise(i, state, velocity(state, start.times[i]))
            h = at.ratio[i + 1] - churned[i]
            x = at.alpha[i + 1] * (y + h * slope)
            if at.ratio[i + 1] > 0:
                _, second = at.data_and_noise(i + 1, x, velocity(x, times[i + 1]))
                x = at.alpha[i + 1] * (y + h / 2 * (slope + second))
            yield x

    def _times_at(self, churned: list[float], at: _Schedule, path: Path) -> list[float]:
        times = path.time_at(-torch.tensor(churned, dtype=torch.float64).log()).tolist()
        if min(times) < -1e-9:
            raise ValueError(f"churn at ratio {at.ratio[0]:g} leads beyond t=0 of {path}: lower EDMHeun.s_max")
        return [t if n == m else new for t, new, n, m in zip(at.times, times, at.ratio, churned)]


@dataclass(frozen=True)
class EulerMaruyama(_GridSolver):
    """Euler-Maruyama for the SDEs that share the flow's marginals, for any diffusion `g(t) >= 0` (arXiv 2303.08797).

    Towards the data `dx = (v + g^2/2 score) dt + g dW`; towards the noise the same with time reversed,
    `x <- x + v dt + g^2/2 score |dt| + g sqrt(|dt|) n`. `g = 0` is Euler. Weak order 1.

    Args:
        diffusion: `"reverse"`, the diffusion that gives the path's own reverse-time SDE (infinite where alpha = 0:
            start the grid later), `"sigma"`, `g = sigma(t)`, or a function of t (any shape).
        scale: factor on g.
    """

    needs_path: ClassVar[bool] = True
    diffusion: Literal["reverse", "sigma"] | Callable[[Tensor], Tensor] = "reverse"
    scale: float = 1.0

    def _states(self, velocity, x, times, path, generator):
        at = _Schedule(path, times)
        named = {"reverse": path.reverse_diffusion, "sigma": path.sigma}
        diffusion = self.diffusion if callable(self.diffusion) else named[self.diffusion]
        g = (self.scale * diffusion(torch.tensor(times, dtype=torch.float64))).tolist()
        for i, (t_now, t_next) in enumerate(pairwise(times)):
            if not math.isfinite(g[i]) or at.sigma[i] == 0:
                raise ValueError(
                    f"EulerMaruyama: diffusion {g[i]:g} with sigma {at.sigma[i]:g} at t={t_now:g} has no finite drift: "
                    f"stay inside {path.snr_range}"
                )
            slope, dt = velocity(x, t_now), abs(t_next - t_now)
            _, noise = at.data_and_noise(i, x, slope)
            x = x + (t_next - t_now) * slope - (g[i] ** 2 * dt / (2 * at.sigma[i])) * noise
            x = x + g[i] * math.sqrt(dt) * _normal(x, generator)
            yield x


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
