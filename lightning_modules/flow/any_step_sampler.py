"""Sampler of networks that know average velocities `u(x, t, r)` (t = 0 noise, t = 1 data)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penstock.lightning_modules.flow.any_step import Average, ends

Style = Literal["few", "any", "mul"]


@dataclass(frozen=True)
class AnyStepSampler:
    """UCGM's sampler as TwinFlow uses it (arXiv 2505.07447, arXiv 2512.05150 and official code).

    Each step asks the network once, takes noise and data from its answer, renews a share of the noise, and mixes the
    two at the next time. The sample is the last data. `few` with `noise=1` suits one to four steps: a step to the data
    leaves the trajectory, so the noise that its answer points from has too little spread (0.632 for 0.5 on a Gaussian
    with two steps), and new noise restores it. `any` and `mul` follow the trajectory and take `noise=0`.

    Args:
        style: The network is asked for the way to the data (`few`), to the next time (`any`), or for the velocity at
            the present one (`mul`).
        noise: Share of the noise that is new at every step, in [0, 1].
        extrapolation: From the third step on, data and noise move on by this part of their last change.
        gaps: (g0, g1) in [0, 1): the first time, and what the last step covers; with `g1 = 0` the steps cover (g0, 1)
            equally.
        kumaraswamy: (a, b, c), positive: times `s` become `(1 - (1 - s^a)^b)^c`; (1, 1, 1) leaves them.

    Raises:
        ValueError: a share or a gap out of range, a bend that is not positive.
    """

    style: Style = "few"
    noise: float = 1.0
    extrapolation: float = 0.0
    gaps: tuple[float, float] = (0.0, 0.0)
    kumaraswamy: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.style not in ("few", "any", "mul"):
            raise ValueError(f"AnyStepSampler: style '{self.style}', expected few, any or mul")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"AnyStepSampler: noise {self.noise}, expected a share in [0, 1]")
        if self.extrapolation < 0:
            raise ValueError(f"AnyStepSampler: extrapolation {self.extrapolation}, expected 0 or more")
        if min(self.gaps) < 0 or sum(self.gaps) >= 1:
            raise ValueError(f"AnyStepSampler: gaps {tuple(self.gaps)}, expected two in [0, 1) with a sum below 1")
        if min(self.kumaraswamy) <= 0:
            raise ValueError(f"AnyStepSampler: kumaraswamy {tuple(self.kumaraswamy)}, expected positive numbers")

    def times(self, steps: int) -> Tensor:
        """`(steps + 1,)` float64 times from the first to 1; `steps=4, gaps=(0.001, 0.5)`: 0.001 .167 .334 .5 1.

        Raises:
            ValueError: `steps` below 1.
        """
        if steps < 1:
            raise ValueError(f"a grid needs at least 1 step, got {steps}")
        first, last = self.gaps
        a, b, c = self.kumaraswamy
        equal = torch.linspace(first, 1 - last, steps + (last == 0), dtype=torch.float64)[:steps]
        return torch.cat([(1 - (1 - equal**a) ** b) ** c, equal.new_ones(1)])

    def __call__(
        self,
        average: Average,
        x0: Tensor,
        steps: int,
        *,
        generator: torch.Generator | None = None,
        renewal: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """The data that each step found; the last one is the sample.

        Args:
            average: `u(x, t, r)` with times `(B,)`; asked in the dtype of `x0`, the state is kept in float64.
            x0: Noise `(B, ...)`.
            steps: Number of network calls, at least 1.
            generator: Source of the renewed noise, on the device of `x0`.
            renewal: The renewed noise itself, `steps - 1` of shape `(B, ...)`.

        Returns:
            `steps` tensors of shape `(B, ...)`, before extrapolation, in the dtype of `x0`.
        """
        times = self.times(steps).tolist()
        x, found, before = x0.double(), [], None
        for i in range(steps):
            now, then = times[i], times[i + 1]
            t, r = (x0.new_full((len(x0),), s) for s in (now, self._until(now, then)))
            u = average(x.to(x0.dtype), t, r)
            source, data = ends(x.to(x0.dtype), u, t)
            found.append(data)
            if i == steps - 1:
                break
            source, data = now_ends = source.double(), data.double()
            if self.extrapolation and i > 1:
                source, data = (e + self.extrapolation * (e - old) for e, old in zip(now_ends, before))
            before = now_ends
            if self.noise:
                new = (
                    torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
                    if renewal is None
                    else renewal[i]
                )
                source = (1 - self.noise) ** 0.5 * source + self.noise**0.5 * new
            x = then * data + (1 - then) * source
        return found

    def _until(self, now: float, then: float) -> float:
        return {"few": 1.0, "any": then, "mul": now}[self.style]
