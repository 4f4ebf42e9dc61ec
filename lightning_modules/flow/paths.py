"""Interpolation paths `x_t = alpha(t) x1 + sigma(t) x0` with t = 0 at the source (noise) and t = 1 at the data.

Sheets and papers that put the data at time 0 are mapped by `t -> 1 - t`, `velocity -> -velocity`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshapes a per-sample coefficient `(B,)` to broadcast over `like` `(B, ...)`, in the dtype of `like`."""
    return coefficient.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class Path(ABC):
    """A Gaussian interpolation path (t = 0 noise, t = 1 data), arXiv 2209.03003 section 2.2, arXiv 2303.08797.

    `x_t = alpha(t) x1 + sigma(t) x0`, conditional velocity `alpha'(t) x1 + sigma'(t) x0`. The methods of one time take
    a tensor of any shape and return the same shape. `x0` is unit noise on every path; the state that a sampler starts
    from at t = 0 has standard deviation `source_std`.

    Attributes:
        source_std: standard deviation of the Gaussian that stands for the law of `x_t` at t = 0.
        t_range: closed interval of t where alpha, sigma and both derivatives are finite.
        snr_range: closed interval of t where alpha and sigma are positive too: every conversion is finite there.
    """

    source_std: float = 1.0
    t_range: tuple[float, float] = (0.0, 1.0)
    snr_range: tuple[float, float] = (1e-3, 1.0 - 1e-3)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def time_at(self, half_log_snr: Tensor) -> Tensor:
        """Inverse of `half_log_snr`."""

    def half_log_snr(self, t: Tensor) -> Tensor:
        """`lambda = log(alpha / sigma)`: half of the log signal-to-noise ratio, rising with t."""
        return self.alpha(t).log() - self.sigma(t).log()

    def d_half_log_snr(self, t: Tensor) -> Tensor:
        """d lambda / dt > 0."""
        return self.d_alpha(t) / self.alpha(t) - self.d_sigma(t) / self.sigma(t)

    def reverse_diffusion(self, t: Tensor) -> Tensor:
        """`g(t)` of the SDE whose noising direction has exactly this path's kernels: `g^2 = 2 sigma^2 lambda'`."""
        return self.sigma(t) * (2 * self.d_half_log_snr(t)).sqrt()

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """`x_t` for noise `x0`, data `x1` `(B, ...)` and times `(B,)`."""
        return expand(self.alpha(t), x1) * x1 + expand(self.sigma(t), x0) * x0

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Conditional velocity `dx_t/dt` for noise `x0`, data `x1` `(B, ...)` and times `(B,)`."""
        return expand(self.d_alpha(t), x1) * x1 + expand(self.d_sigma(t), x0) * x0


@dataclass(frozen=True)
class Linear(Path):
    """`alpha = t`, `sigma = 1 - t`: rectified flow (arXiv 2209.03003 eq. 1) and conditional optimal transport."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return half_log_snr.sigmoid()

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        return x1 - x0


@dataclass(frozen=True)
class Cosine(Path):
    """`alpha = sin(pi t / 2)`, `sigma = cos(pi t / 2)`: the trigonometric interpolant (arXiv 2209.15571)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * (math.pi / 2))

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.sigma(t) * (math.pi / 2)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.alpha(t) * (-math.pi / 2)

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return torch.atan(half_log_snr.exp()) * (2 / math.pi)


@dataclass(frozen=True)
class ImprovedCosine(Path):
    """The continuous form of the improved-DDPM schedule (arXiv 2102.09672 eq. 17), variance preserving.

    `alpha = cos(a) / cos(a0)` with `a = (pi/2) (1 - t + offset) / (1 + offset)`, `a0 = a(t=1)`.

    Args:
        offset: the paper's `s`, positive.
    """

    offset: float = 0.008
    t_range = (0.0, 1.0 - 1e-5)

    def __post_init__(self):
        if self.offset <= 0:
            raise ValueError(f"ImprovedCosine.offset must be positive, got {self.offset}")

    @property
    def _a0(self) -> float:
        return math.pi / 2 * self.offset / (1 + self.offset)

    def _angle_from_end(self, t: Tensor) -> Tensor:
        return (1 - t) * (math.pi / 2 / (1 + self.offset))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2 / (1 + self.offset))) / math.cos(self._a0)

    def sigma(self, t: Tensor) -> Tensor:
        a = self._angle_from_end(t)
        return (torch.sin(a) * torch.sin(a + 2 * self._a0)).sqrt() / math.cos(self._a0)

    def d_alpha(self, t: Tensor) -> Tensor:
        angle = self._angle_from_end(t) + self._a0
        return torch.sin(angle) * (math.pi / 2 / (1 + self.offset) / math.cos(self._a0))

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        alpha = (2 * half_log_snr).sigmoid().sqrt()
        return torch.asin(alpha * math.cos(self._a0)) * (2 / math.pi * (1 + self.offset))


@dataclass(frozen=True)
class _LinearBeta(Path):
    """Shared `alpha = exp(-T/2)`, `T = b s + (B - b) s^2 / 2`, `s = 1 - t` of VP and sub-VP (arXiv 2011.13456)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    snr_range = (0.0, 1.0 - 1e-5)

    def __post_init__(self):
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"needs 0 < beta_min < beta_max, got beta_min={self.beta_min}, beta_max={self.beta_max}")

    def _integral(self, t: Tensor) -> Tensor:
        s = 1 - t
        return s * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * s)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (1 - t) * (self.beta_max - self.beta_min)

    def _time_at_integral(self, integral: Tensor) -> Tensor:
        span = self.beta_max - self.beta_min
        return 1 - 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * span * integral).sqrt())

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * self._beta(t) * self.alpha(t)


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance-preserving path `sigma = sqrt(1 - alpha^2)` (arXiv 2011.13456 eq. 32-33); its law at t = 0 is N(0, I).

    Args:
        beta_min: noise rate at the data, positive.
        beta_max: noise rate at the source, above `beta_min`.
    """

    t_range = (0.0, 1.0 - 1e-5)

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t) * torch.exp(-self._integral(t)) / self.sigma(t)

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return self._time_at_integral(torch.nn.functional.softplus(-2 * half_log_snr))


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-VP path `sigma = 1 - alpha^2` (arXiv 2011.13456 eq. 34); its law at t = 0 is N(0, I).

    Args:
        beta_min: noise rate at the data, positive.
        beta_max: noise rate at the source, above `beta_min`.
    """

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self._beta(t) * torch.exp(-self._integral(t))

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        noise_over_data = torch.exp(-half_log_snr)
        return self._time_at_integral(2 * torch.asinh(noise_over_data / 2))


@dataclass(frozen=True)
class VE(Path):
    """Variance-exploding path `alpha = 1`, `sigma = sigma_min sqrt(r^(2(1-t)) - 1)`, `r = sigma_max / sigma_min`.

    The geometric schedule of arXiv 2011.13456 eq. 30 as an interpolant (arXiv 2209.03003 section 2.2). The law at
    t = 0 is that of data plus noise of standard deviation about `sigma_max`: samplers start from `source_std` = that.

    Args:
        sigma_min: noise scale near the data, in units of the data.
        sigma_max: noise scale at the source, above `sigma_min`.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_range = (0.0, 1.0 - 1e-5)
    snr_range = (0.0, 1.0 - 1e-5)

    def __post_init__(self):
        _check_sigmas(self)

    @property
    def source_std(self) -> float:
        return math.sqrt(self.sigma_max**2 - self.sigma_min**2)

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.expm1(self._rate * (1 - t)).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -0.5 * self._rate * self.sigma_min**2 * torch.exp(self._rate * (1 - t)) / self.sigma(t)

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return 1 - torch.log1p(torch.exp(-2 * half_log_snr) / self.sigma_min**2) / self._rate


@dataclass(frozen=True)
class EDM(Path):
    """Variance-exploding path with noise linear in time, `alpha = 1`, `sigma = sigma_max (1 - t)` (arXiv 2206.00364).

    The paper's time is `sigma` itself, an affine function of t, so that steps in t and in sigma are the same steps.

    Args:
        sigma_min: smallest noise scale of `snr_range`, in units of the data.
        sigma_max: noise scale at the source (`source_std`).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        _check_sigmas(self)

    @property
    def source_std(self) -> float:
        return self.sigma_max

    @property
    def snr_range(self) -> tuple[float, float]:
        return 0.0, 1.0 - self.sigma_min / self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (1 - t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -self.sigma_max)

    def time_at(self, half_log_snr: Tensor) -> Tensor:
        return 1 - torch.exp(-half_log_snr) / self.sigma_max


def _check_sigmas(path: VE | EDM) -> None:
    if not 0 < path.sigma_min < path.sigma_max:
        raise ValueError(f"needs 0 < sigma_min < sigma_max, got {path.sigma_min} and {path.sigma_max}")
