"""Laws of the training time t (0 noise, 1 data), each as an inverse distribution function of uniform numbers.

A method draws `u` from its own random stream and asks `quantile(u)`; nothing here draws numbers.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from scipy.special import betaincinv, betaln
from torch import Tensor


def stratified(u: Tensor) -> Tensor:
    """Independent uniforms `(B,)` moved into B equal strata, one each: `(i + u_i) / B`."""
    return (torch.arange(len(u), device=u.device, dtype=u.dtype) + u) / len(u)


def low_discrepancy(offset: Tensor, n: int) -> Tensor:
    """`(offset + i / n) mod 1`, i = 0..n-1, for one uniform `offset` (scalar): arXiv 2107.00630 appendix I.1."""
    return (offset + torch.arange(n, device=offset.device, dtype=offset.dtype) / n) % 1


def antithetic(u: Tensor) -> Tensor:
    """Keeps the first half of `(B,)` (rounded up) and mirrors it, `1 - u`, into the second half."""
    half = (len(u) + 1) // 2
    return torch.cat([u[:half], 1 - u[: len(u) - half]])


class TimeSampler(ABC):
    """A law of t in [0, 1] (0 noise, 1 data)."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Times for uniform numbers `u` in (0, 1), any shape; non-decreasing in `u`."""


class ContinuousTime(TimeSampler):
    """A law with a density."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Probability density at `t`, any shape; 0 outside of the support."""


@dataclass(frozen=True)
class Uniform(ContinuousTime):
    """`t ~ U(eps, 1)` (arXiv 2209.03003; eps as in its experiments).

    Args:
        eps: smallest time, in [0, 1).
    """

    eps: float = 1e-3

    def __post_init__(self):
        _check_eps(self.eps, 1.0)

    def quantile(self, u: Tensor) -> Tensor:
        return u * (1 - self.eps) + self.eps

    def density(self, t: Tensor) -> Tensor:
        return ((t >= self.eps) & (t <= 1)).to(t.dtype) / (1 - self.eps)


@dataclass(frozen=True)
class LogitNormal(ContinuousTime):
    """`logit(t) ~ N(mean, std^2)` (arXiv 2403.03206 eq. 19, mirrored: a positive mean favours the data side here).

    Args:
        mean: mean of the logit.
        std: standard deviation of the logit, positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"LogitNormal.std must be positive, got {self.std}")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        inside = (t > 0) & (t < 1)
        safe = torch.where(inside, t, 0.5)
        z = (torch.logit(safe) - self.mean) / self.std
        value = torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2 * math.pi) * safe * (1 - safe))
        return torch.where(inside, value, 0.0)


@dataclass(frozen=True)
class UShaped(ContinuousTime):
    """`p(t) = a cosh(a (t - 1/2)) / (2 sinh(a/2))` (arXiv 2405.20320 section 4.1), symmetric about 1/2.

    Sampled in closed form: `t = 1/2 + asinh((2u - 1) sinh(a/2)) / a`, then squeezed into [eps, 1 - eps].

    Args:
        a: sharpness, positive (a -> 0 is uniform).
        eps: margin at both ends, in [0, 0.5).
    """

    a: float = 4.0
    eps: float = 0.0

    def __post_init__(self):
        if self.a <= 0:
            raise ValueError(f"UShaped.a must be positive, got {self.a} (use Uniform for a flat law)")
        _check_eps(self.eps, 0.5)

    def quantile(self, u: Tensor) -> Tensor:
        t = 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a
        return t * (1 - 2 * self.eps) + self.eps

    def density(self, t: Tensor) -> Tensor:
        width = 1 - 2 * self.eps
        inner = (t - self.eps) / width
        value = self.a * torch.cosh(self.a * (inner - 0.5)) / (2 * math.sinh(self.a / 2)) / width
        return torch.where((inner >= 0) & (inner <= 1), value, 0.0)


class Beta(ContinuousTime):
    """`t ~ Beta(a, b)`, density `t^(a-1) (1-t)^(b-1) / B(a, b)`.

    The quantile is tabulated once in logit coordinates, where it is smooth and straight in both tails, and read by
    cubic Hermite interpolation with exact slopes (error below 1e-7): no transfer between devices in a training step.

    Args:
        a: first shape, from 0.05 on.
        b: second shape, from 0.05 on.
    """

    _REACH, _STEP = 30.0, 1 / 32

    def __init__(self, a: float = 2.0, b: float = 1.0):
        if min(a, b) < 0.05:
            raise ValueError(f"Beta needs a and b of at least 0.05, got a={a}, b={b}")
        self.a, self.b = a, b
        w = torch.arange(-self._REACH, self._REACH + self._STEP / 2, self._STEP, dtype=torch.float64)
        low = torch.from_numpy(betaincinv(a, b, torch.sigmoid(w.clamp(max=0)).numpy()))
        high = torch.from_numpy(betaincinv(b, a, torch.sigmoid(-w.clamp(min=0)).numpy()))
        log_t = torch.where(w <= 0, low.log(), torch.log1p(-high))
        log_rest = torch.where(w <= 0, torch.log1p(-low), high.log())
        slope = torch.exp(
            torch.nn.functional.logsigmoid(w)
            + torch.nn.functional.logsigmoid(-w)
            + float(betaln(a, b))
            - a * log_t
            - b * log_rest
        )
        self._table = torch.stack([log_t - log_rest, slope * self._STEP])

    def __repr__(self) -> str:
        return f"Beta(a={self.a}, b={self.b})"

    def quantile(self, u: Tensor) -> Tensor:
        if self._table.device != u.device:
            self._table = self._table.to(u.device)
        value, slope = self._table
        place = (torch.logit(u.double()) + self._REACH) / self._STEP
        left = place.floor().clamp(0, len(value) - 2).long()
        p = (place - left).clamp(0, 1)
        q = 1 - p
        y = q.square() * ((1 + 2 * p) * value[left] + p * slope[left]) + p.square() * (
            (1 + 2 * q) * value[left + 1] - q * slope[left + 1]
        )
        return torch.sigmoid(y).to(u.dtype)

    def density(self, t: Tensor) -> Tensor:
        inside = (t >= 0) & (t <= 1)
        safe = torch.where(inside, t, 0.5)
        return torch.where(
            inside, safe ** (self.a - 1) * (1 - safe) ** (self.b - 1) / math.exp(betaln(self.a, self.b)), 0
        )


@dataclass(frozen=True)
class Fixed(TimeSampler):
    """One time for every sample, as in one-step distillation (arXiv 2209.03003 section 2.3; `t = 1e-3`).

    Args:
        t: the time, in [0, 1].
    """

    t: float = 1e-3

    def __post_init__(self):
        if not 0 <= self.t <= 1:
            raise ValueError(f"Fixed.t must be in [0, 1], got {self.t}")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.t)


@dataclass(frozen=True)
class Grid(TimeSampler):
    """`t = j (1 - eps) / k + eps`, `j` uniform in {0..k-1}: the times at which a k-step Euler sampler looks.

    Args:
        k: number of times, at least 1.
        eps: first time, in [0, 1).
    """

    k: int
    eps: float = 1e-3

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"Grid.k must be at least 1, got {self.k}")
        _check_eps(self.eps, 1.0)

    def quantile(self, u: Tensor) -> Tensor:
        return (u * self.k).floor().clamp(max=self.k - 1) * (1 - self.eps) / self.k + self.eps


@dataclass(frozen=True)
class Shift(ContinuousTime):
    """Moves another law towards the noise: `t -> t / (t + k (1 - t))` (arXiv 2403.03206 eq. 23, mirrored in time).

    Args:
        base: the law before the shift.
        k: factor on the noise-to-data ratio, positive; above 1 favours the noise side, 1 changes nothing.
    """

    base: ContinuousTime
    k: float = 3.0

    def __post_init__(self):
        if self.k <= 0:
            raise ValueError(f"Shift.k must be positive, got {self.k}")

    def quantile(self, u: Tensor) -> Tensor:
        t = self.base.quantile(u)
        return t / (t + self.k * (1 - t))

    def density(self, t: Tensor) -> Tensor:
        scale = 1 + (self.k - 1) * t
        return self.base.density(self.k * t / scale) * self.k / scale.square()


def _check_eps(eps: float, limit: float) -> None:
    if not 0 <= eps < limit:
        raise ValueError(f"eps must be in [0, {limit:g}), got {eps}")
