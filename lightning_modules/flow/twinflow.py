"""The losses of a TwinFlow training step (arXiv 2512.05150), t = 0 noise, t = 1 data, the twin at t in (1, 2]."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from penstock.lightning_modules.flow.any_step import STEP, mix, noise_share, rcgm_target, time_weight
from penstock.lightning_modules.flow.blocks import Shares
from penstock.lightning_modules.flow.losses import FlowLoss, Regression


class StepDraws(NamedTuple):
    """All that is random in a training step.

    Attributes:
        t: Times `(B,)` in [0, 1] before the blocks change them.
        reach: Uniforms `(B,)`: how far the steps of the block `any` go.
        near: Uniforms `(B,)`: how far those of `mul` go.
        noise: `x_0` of the batch `(B, ...)`.
        adv_noise: Noise that the samples of the block `adv` are made of `(n, ...)`.
        twin_noise: New noise on the samples of `e2e`, for the rectification `(n, ...)`.
        twin_t: Times of it `(n,)` in [0, 1].
        free_noise: Noise that all data are made of, where no images are used `(B, ...)`.
    """

    t: Tensor
    reach: Tensor
    near: Tensor
    noise: Tensor
    adv_noise: Tensor
    twin_noise: Tensor
    twin_t: Tensor
    free_noise: Tensor | None


class Terms(NamedTuple):
    """What a training step computes; `base` and `rectify` are losses of single samples.

    Attributes:
        base: Any-step loss with its time weight, and the adversarial loss in the rows of `adv`, `(B,)`.
        rectify: Rectification loss of the rows of `e2e`, or None where there is none.
        rows: Rows of each block.
        prediction: `u` of the online network `(B, ...)`.
        target: What it is compared with, `(B, ...)`.
        velocity: `x_1 - x_0`, with guidance in it where that acts.
        gap: `u_twin - u_real` on the samples of `e2e`, clamped; None as `rectify`.
    """

    base: Tensor
    rectify: Tensor | None
    rows: dict[str, slice]
    prediction: Tensor
    target: Tensor
    velocity: Tensor
    gap: Tensor | None


@contextmanager
def untracked() -> Iterator[None]:
    """No gradient, and no reuse of weights cast by autocast.

    Those are kept by parameter: cast without gradient they would cut a later call's off, and after a change of the
    weights behind a parameter they would be the old ones.
    """
    reuse = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(reuse)


def one_step(net: nn.Module, x0: Tensor, cond: Tensor | None) -> Tensor:
    """Samples `x_0 + u(x_0, 0, 1)` `(B, ...)`."""
    zero = x0.new_zeros(len(x0))
    return x0 + net(x0, zero, cond, zero + 1)


@dataclass(frozen=True)
class TwinObjective:
    """Any-step, adversarial and rectification losses of one batch; the network is called `net(x, t, cond, r)`.

    The online network sees the batch once with gradient. Without: the samples of `adv` (a call for each of their rows),
    the data where no images are used (one for each other row), guidance (two for each row of `mul`, `any` and `one`),
    the chain of the any-step target (`order` for each real row), and the gap (two for each row of `e2e`, whose samples
    come from the call with gradient).

    Args:
        loss: What a prediction costs.
        order: N, the steps of the target's chain; 0 is flow matching.
        consistency: How far `any` reaches, in [0, 1]; the rectification acts at 1 only, and at 0 all is flow matching.
        shares: Relative sizes of the blocks.
        rectified: Whether the rectification is wanted.
        enhanced_ratio: w of `v + w (u_c - u_e)`.
        enhanced_range: Shares of noise (a, b) between which, both excluded, guidance acts.
        image_free: Data are the network's own samples.
        frozen: The reference is a frozen teacher, whose guidance is the target of image-free training; the chain asks
            the online network.
        first_step: D, how far the chain follows the data's velocity first.
        near: How far `mul` reaches at most, as a share of the way to 1.
    """

    loss: FlowLoss
    order: int
    consistency: float
    shares: Shares
    rectified: bool
    enhanced_ratio: float
    enhanced_range: tuple[float, float]
    image_free: bool
    frozen: bool
    first_step: float = STEP
    near: float = 0.05

    def terms(
        self,
        net: nn.Module,
        x1: Tensor,
        cond: Tensor | None,
        d: StepDraws,
        empty: Tensor | None = None,
        reference: Callable[[], AbstractContextManager[None]] = nullcontext,
        called: Callable[[], None] = lambda: None,
    ) -> Terms:
        """The losses.

        Args:
            net: The online network.
            x1: Data `(B, ...)`.
            cond: Condition of each sample, or None.
            d: All that is random.
            empty: Conditions `(B, ...)` of the weak side of the guidance; None drops them.
            reference: Inside, `net` has the weights that give targets.
            called: What happens after the call with gradient and before the first target.
        """
        rows = self.shares.rows(len(x1))
        e2e, adv, real = rows["e2e"], rows["adv"], slice(0, rows["adv"].start)
        t, r = self.times(d, rows)
        with untracked():
            if d.free_noise is not None:
                own = one_step(net, d.free_noise[real], _rows(cond, real))
                x1 = torch.cat([own, x1[adv]])
            if adv.start < adv.stop:
                x1 = torch.cat([x1[real], one_step(net, d.adv_noise, _rows(cond, adv))])
            x_t, velocity = mix(d.noise, x1, t), x1 - d.noise
        u = net(x_t, t, cond, r)
        called()
        with untracked():
            guided = slice(e2e.stop, real.stop)
            if self.enhanced_ratio and guided.start < guided.stop:
                weak = _rows(empty, guided)
                with reference():
                    found = self.guided(net, velocity[guided], x_t[guided], t[guided], cond[guided], weak)
                velocity = torch.cat([velocity[: e2e.stop], found, velocity[real.stop :]])
            target = velocity
            if self.order and self.consistency and real.stop:
                with nullcontext() if self.frozen else reference():
                    found = rcgm_target(
                        _conditioned(net, _rows(cond, real)),
                        *(value[real] for value in (u, velocity, x_t, t, r)),
                        self.order,
                        self.first_step,
                    )
                target = torch.cat([found, velocity[adv]])
            weight = torch.cat([time_weight(t[real], r[real]), torch.ones_like(t[adv])])
        base = self.loss(Regression(u, target, x_t, d.noise, x1, 1 - noise_share(t))) * weight
        if not (self.rectified and self.consistency == 1 and e2e.stop):
            return Terms(base, None, rows, u, target, velocity, None)
        jump = u[e2e]
        gap = self.gap(net, (d.noise[e2e] + jump).detach(), _rows(cond, e2e), d.twin_noise, d.twin_t)
        pull = Regression(jump, (jump - gap).detach(), x_t[e2e], d.noise[e2e], x1[e2e], t[e2e])
        return Terms(base, self.loss(pull), rows, u, target, velocity, gap)

    def times(self, d: StepDraws, rows: dict[str, slice]) -> tuple[Tensor, Tensor]:
        """`t` and `r` `(B,)` of all blocks."""
        one = torch.ones_like(d.t)
        reach = {
            "e2e": one,
            "one": one,
            "mul": d.near * min(self.near, self.consistency),
            "any": d.reach * self.consistency,
        }
        starts = {"e2e": 1 - one, "adv": 2 - d.t}
        t = torch.cat([starts.get(name, d.t)[at] for name, at in rows.items()])
        way = torch.cat([reach.get(name, 1 - one)[at] for name, at in rows.items()])
        return t, t + way * (1 - t)

    def guided(
        self, net: nn.Module, velocity: Tensor, x: Tensor, t: Tensor, cond: Tensor, empty: Tensor | None
    ) -> Tensor:
        """`v + w (u_c - u_e)` where guidance acts, `v` elsewhere, of the network's present weights."""
        if empty is None:
            empty = net.drop_condition(cond, torch.ones_like(t, dtype=torch.bool))
        double = torch.cat([t, t])
        u_c, u_e = net(torch.cat([x, x]), double, torch.cat([cond, empty]), double).chunk(2)
        low, high = self.enhanced_range
        acts = ((1 - t > low) & (1 - t < high)).reshape(-1, *[1] * (x.ndim - 1))
        own = u_e if self.image_free and self.frozen else velocity
        return torch.where(acts, own + self.enhanced_ratio * (u_c - u_e), velocity)

    @untracked()
    def gap(self, net: nn.Module, sample: Tensor, cond: Tensor | None, noise: Tensor, t: Tensor) -> Tensor:
        """`clamp(u_twin - u_real, -1, 1)` of noised samples `(n, ...)` at times `(n,)`, in one call."""
        x, both = mix(noise, sample, t), torch.cat([2 - t, t])
        twin, real = net(torch.cat([x, x]), both, None if cond is None else torch.cat([cond, cond]), both).chunk(2)
        return (twin - real).to(torch.promote_types(x.dtype, torch.float32)).clamp(-1, 1)

    def any_step(self, net: nn.Module, x0: Tensor, x1: Tensor, t: Tensor, r: Tensor, cond: Tensor | None) -> Tensor:
        """Any-step loss `(B,)` from t to r, both `(B,)`, without guidance, time weight or other weights for targets."""
        x_t, target = mix(x0, x1, t), x1 - x0
        u = net(x_t, t, cond, r)
        if self.order and self.consistency:
            with untracked():
                target = rcgm_target(_conditioned(net, cond), u, target, x_t, t, r, self.order, self.first_step)
        return self.loss(Regression(u, target, x_t, x0, x1, t))


def _rows(cond: Tensor | None, rows: slice) -> Tensor | None:
    return None if cond is None else cond[rows]


def _conditioned(net: nn.Module, cond: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, r: net(x, t, cond, r)
