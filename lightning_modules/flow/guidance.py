"""Guidance: a conditional network and a weaker prediction, extrapolated, as a velocity (t = 0 noise, t = 1 data)."""

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.lightning_modules.flow.paths import Linear, Path, expand
from penstock.lightning_modules.flow.prediction import Prediction, convert


class Guided:
    """`F = F_weak + scale (F_cond - F_weak)` (arXiv 2207.12598), read as a velocity.

    `F_weak` is the same network with its condition dropped, evaluated in one doubled batch, or another network with the
    same condition (autoguidance, arXiv 2406.02507). Any prediction type gives the same guided flow, since every
    conversion is affine. `scale = 1` is the plain conditional flow at one call.

    Args:
        net: `net(x, t, cond)`, with `drop_condition(cond, mask)` when `weak` is None and `scale` is not 1.
        cond: condition `(B, ...)`, or None for the unconditional flow.
        scale: guidance scale; 1 = conditional, 0 = weak.
        interval: times [from, to] at which guidance acts (arXiv 2404.07724); elsewhere the plain conditional flow.
            Other than (0, 1) it costs one wait for the device a call.
        rescale: share phi in [0, 1] of the guided prediction brought to the conditional one's standard deviation
            (arXiv 2305.08891 eq. 15-16).
        weak: weaker network for autoguidance.
        prediction: what the networks predict.
        path: the interpolation path, used when `prediction` is not the velocity.

    Attributes:
        nfe: network evaluations per sample so far; a doubled batch counts 2.

    Raises:
        ValueError: `rescale` outside of [0, 1], or guidance without a condition.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        cond: Tensor | None,
        scale: float = 1.0,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        weak: Callable[..., Tensor] | None = None,
        prediction: Prediction = "velocity",
        path: Path = Linear(),  # noqa: B008
    ):
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {rescale}")
        if scale != 1 and cond is None and weak is None:
            raise ValueError(f"guidance scale {scale:g} needs a condition: pass cond, or use scale 1")
        self.net, self.cond, self.scale, self.interval = net, cond, scale, interval
        self.rescale, self.weak, self.prediction, self.path = rescale, weak, prediction, path
        self.nfe = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity `(B, ...)` at states `x` `(B, ...)` and times `t` `(B,)`."""
        return convert(self._predict(x, t), self.prediction, "velocity", x, t, self.path)

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        if self.scale == 1:
            return self._plain(x, t)
        if self.interval == (0.0, 1.0):
            return self._extrapolate(*self._pair(x, t))
        active = (t >= self.interval[0]) & (t <= self.interval[1])
        if not bool(active.any()):
            return self._plain(x, t)
        strong, weak = self._pair(x, t)
        return torch.where(expand(active, x).bool(), self._extrapolate(strong, weak), strong)

    def _plain(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += 1
        return self.net(x, t, self.cond)

    def _pair(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.nfe += 2
        if self.weak is not None:
            return self.net(x, t, self.cond), self.weak(x, t, self.cond)
        dropped = torch.arange(2 * len(x), device=x.device) >= len(x)
        cond = self.net.drop_condition(torch.cat([self.cond, self.cond]), dropped)
        strong, weak = self.net(torch.cat([x, x]), torch.cat([t, t]), cond).chunk(2)
        return strong, weak

    def _extrapolate(self, strong: Tensor, weak: Tensor) -> Tensor:
        guided = weak + self.scale * (strong - weak)
        if self.rescale == 0:
            return guided
        factor = strong.flatten(1).std(1) / guided.flatten(1).std(1)
        return guided * expand(self.rescale * factor + (1 - self.rescale), guided)
