"""Log-likelihood by the instantaneous change of variables (t = 0 noise, t = 1 data)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penstock.lightning_modules.flow.paths import Linear, Path
from penstock.lightning_modules.flow.solvers import RK45, Solver, Velocity

Noise = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class Likelihood:
    """Result of `log_prob`.

    Attributes:
        log_prob: `log p(x)` in nats over all dimensions, `(B,)`.
        z: the encoded state at the last time of the grid, shape of `x`.
        nfe: calls of the velocity (each with its divergence).
    """

    log_prob: Tensor
    z: Tensor
    nfe: int


def divergence(velocity: Velocity, x: Tensor, t: Tensor, epsilon: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The velocity and its divergence.

    Args:
        velocity: function of states `(B, ...)` and times `(B,)`, samples of a batch independent of each other.
        x: states `(B, ...)`.
        t: times `(B,)`.
        epsilon: probe of unit covariance, shape of `x`, for the estimate `eps^T J eps` (arXiv 1810.01367 eq. 7); None
            for the exact trace, one backward pass for each dimension.

    Returns:
        velocity (shape of `x`) and divergence `(B,)`, both detached.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, t)
        if epsilon is not None:
            (pulled,) = torch.autograd.grad(v, x, epsilon)
            return v.detach(), (pulled * epsilon).flatten(1).sum(1)
        flat = v.flatten(1)
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for i in range(flat.shape[1]):
            (row,) = torch.autograd.grad(flat[:, i].sum(), x, retain_graph=i + 1 < flat.shape[1])
            trace = trace + row.flatten(1)[:, i]
        return v.detach(), trace


def log_prob(
    velocity: Velocity,
    x: Tensor,
    grid: Tensor,
    *,
    solver: Solver = RK45(),  # noqa: B008
    trace: Literal["exact", "hutchinson"] = "hutchinson",
    noise: Noise = "rademacher",
    epsilon: Tensor | None = None,
    generator: torch.Generator | None = None,
    path: Path = Linear(),  # noqa: B008
) -> Likelihood:
    """`log p(x) = log N(z; 0, source_std^2) + l` with `dx = v dt`, `dl = div v dt` along a descending grid.

    arXiv 1806.07366 eq. 8, arXiv 2011.13456 appendix D.2. State and l form one system, so that an adaptive solver
    controls the error of both; the probe is the same throughout one integration.

    Args:
        velocity: function of states `(B, ...)` and times `(B,)`.
        x: data `(B, ...)`.
        grid: descending times, such as `(1, 1e-5)` for `RK45`.
        solver: an ODE solver: Euler, Heun, Midpoint or RK45.
        trace: exact divergence or Hutchinson's estimate.
        noise: law of the probe when `epsilon` is not given.
        epsilon: probe, shape of `x`; only for `trace="hutchinson"`.
        generator: source of the probe when `epsilon` is not given.
        path: gives the `source_std` of the law at t = 0.

    Raises:
        ValueError: an ascending grid, a solver that is not a plain ODE solver, a probe with the exact trace or of
            another shape than `x`.
    """
    if solver.needs_path:
        raise ValueError(f"likelihood needs a plain ODE solver (Euler, Heun, Midpoint, RK45), got {solver}")
    if grid[0] < grid[-1]:
        raise ValueError("likelihood encodes: the grid must descend from the data (t=1) to the noise")
    if trace == "exact" and epsilon is not None:
        raise ValueError("trace='exact' takes no epsilon")
    if trace == "hutchinson" and epsilon is None:
        epsilon = probe(x, noise, generator)
    if epsilon is not None and epsilon.shape != x.shape:
        raise ValueError(f"epsilon must have the shape of x {tuple(x.shape)}, got {tuple(epsilon.shape)}")

    def augmented(state: Tensor, t: Tensor) -> Tensor:
        v, div = divergence(velocity, state[:, :-1].reshape(x.shape), t, epsilon)
        return torch.cat([v.flatten(1), div[:, None]], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    solution = solver(augmented, start, grid, path=path)
    z, change = solution.x[:, :-1], solution.x[:, -1]
    dim, std = z.shape[1], path.source_std
    prior = -0.5 * z.square().sum(1) / std**2 - dim * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return Likelihood(prior + change, z.reshape(x.shape), solution.nfe)


def probe(like: Tensor, noise: Noise, generator: torch.Generator | None = None) -> Tensor:
    """A probe of zero mean and unit covariance in the shape of `like`."""
    device = generator.device if generator is not None else like.device
    if noise == "gaussian":
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
    bits = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def bits_per_dim(log_prob: Tensor, dim: int, offset: float = 0.0) -> Tensor:
    """`-log_prob / (dim ln 2) + offset`.

    `offset` accounts for scaling: 7 for 8-bit data dequantised and mapped to [-1, 1] (log2 of 256 / 2), 8 for [0, 1].
    """
    return -log_prob / (dim * math.log(2)) + offset
