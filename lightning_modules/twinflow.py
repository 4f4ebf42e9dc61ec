"""TwinFlow: "Realizing One-step Generation on Large Models with Self-adversarial Flows" (arXiv 2512.05150)."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.any_step import mix, rcgm_target, time_weight
from penstock.lightning_modules.flow.any_step_sampler import AnyStepSampler
from penstock.lightning_modules.flow.barron import Barron
from penstock.lightning_modules.flow.blocks import Shares
from penstock.lightning_modules.flow.losses import FlowLoss, Regression
from penstock.lightning_modules.flow.times import TimeSampler, Uniform
from penstock.lightning_modules.flow_module import FlowModule, Key
from penstock.lightning_modules.nets import lora
from penstock.lightning_modules.nets.any_step import AnyStep
from penstock.lightning_modules.nets.shadow import Shadow, untracked
from penstock.lightning_modules.seeds import run_seed


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


class TwinFlow(FlowModule):
    """An any-step flow that is its own critic: `u(x, t, r)` carries x from t to r > t; t = 0 is noise, t = 1 data.

    The batch is cut into blocks (section 3.3 and official code), each with times of its own:

    | block | t | r | data | target |
    |---|---|---|---|---|
    | `e2e` | 0 | 1 | real | any-step, and the rectification |
    | `mul` | random | at most 5 % of the way to 1 | real | any-step |
    | `any` | random | random | real | any-step |
    | `one` | random | 1 | real | any-step |
    | `adv` | 2 - t | t | own one-step samples | `x_1 - x_0` |

    Any-step target: recursive consistency of order N (eq. 5, `flow.any_step.rcgm_target`). The rows of `adv` teach the
    network, at times in (1, 2], the velocity of its own samples (eq. 8); where it differs from the velocity of the
    data, the one-step samples move by that difference (rectification, eqs. 9 to 11): `u(x_0, 0, 1)` is drawn to
    `u - clamp(u_twin - u_real, -1, 1)`, both on samples with fresh noise.

    Order 0 is flow matching (only `mul` and `adv` count); shares of 0 leave a block out: without `adv` and with
    `rectify=0` this is RCGM; `order=1` with `one` alone a consistency model, with `any` alone MeanFlow's condition.

    Args:
        net: `net(x, t, cond)`, which gets a second time embedding, or `net(x, t, cond, r)`.
        optimizer: Makes the optimiser from the parameters that train.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        times: Law of t; None is uniform.
        loss: What a prediction costs; None is Barron's reweighting.
        sampler: Of `sample` with a number of steps; None re-noises after a jump to the data (`few`).
        order: N, the steps of the target's chain.
        consistency: How far `any` reaches, in [0, 1]; the rectification acts at 1 only.
        shares: Relative sizes of the blocks.
        rectify: Weight of the rectification; 0 leaves it out.
        enhanced_ratio: w, guidance that the weights learn: `v + w (u_c - u_e)`, a scale of `1 / (1 - w)`.
        enhanced_range: Shares of noise (a, b) between which, both excluded, it acts.
        ema_decay: Of the weights that give targets: 0 is the network itself, 1 its weights at the start (a frozen
            teacher, for the guidance only); between, the average's decay rises from 0.
        image_free: Learn from the network's own samples, without the batch's data.
        condition_dropout: Share of the rows whose condition is dropped, so that `u_e` learns, in [0, 1].
        key: Entry of the batch that holds the data.
        initial: Checkpoint whose raw weights training starts from: of this method, or of a flow with one time.
        lora_rank: 0 trains all weights; r trains low-rank parts of that rank only.
        lora_alpha: Strength of the low-rank parts.

    Raises:
        ValueError: an option out of its range; `enhanced_ratio` of 1 or more without a frozen teacher.
    """

    default_steps = predict_steps = 1

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        times: TimeSampler | None = None,
        loss: FlowLoss | None = None,
        sampler: AnyStepSampler | None = None,
        order: int = 2,
        consistency: float = 1.0,
        shares: Shares = Shares(),  # noqa: B008
        rectify: float = 0.5,
        enhanced_ratio: float = 0.0,
        enhanced_range: tuple[float, float] = (0.0, 1.0),
        ema_decay: float = 0.99,
        image_free: bool = False,
        condition_dropout: float = 0.1,
        key: Key = "image",
        initial: str | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 64.0,
    ):
        super().__init__(
            net if "r" in inspect.signature(net.forward).parameters else AnyStep(net),
            optimizer, scheduler, None, None, 0.0, 1.0, key, initial,
        )  # fmt: skip
        if order < 0:
            raise ValueError(f"order={order}: expected 0 (flow matching) or more")
        for name, value in (("consistency", consistency), ("ema_decay", ema_decay), ("dropout", condition_dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: expected a number in [0, 1]")
        if enhanced_ratio >= 1 > ema_decay:
            raise ValueError(
                f"enhanced_ratio={enhanced_ratio}: expected below 1 (a scale of 1 / (1 - ratio)), or ema_decay=1.0, "
                f"a frozen teacher"
            )
        if not 0 <= enhanced_range[0] < enhanced_range[1] <= 1:
            raise ValueError(
                f"enhanced_range={list(enhanced_range)}: expected two shares of noise in [0, 1], ascending"
            )
        self.times, self.loss, self.sampler = times or Uniform(0.0), loss or Barron(), sampler or AnyStepSampler()
        self.order, self.consistency, self.shares, self.rectify = order, consistency, shares, rectify
        self.enhanced_ratio, self.enhanced_range, self.image_free = enhanced_ratio, enhanced_range, image_free
        self.ema_decay, self.condition_dropout, self.lora_rank = ema_decay, condition_dropout, lora_rank
        if lora_rank:
            lora.adapt(self.net, lora_rank, lora_alpha)
        self.shadow = Shadow(self.net) if ema_decay else None
        self.ramp = 0.0

    # ------------------------------------------------------------------ start

    def initial_weights(self, state: dict[str, Any]) -> dict[str, Any]:
        own = super().initial_weights(state)
        if isinstance(self.net, AnyStep) and not own.keys() & self.net.state_dict().keys():
            own = self.net.adopt(own)
        return lora.base_state(self.net, own) if self.lora_rank else own

    def precheck(self, data: Any) -> None:
        super().precheck(data)
        self.loss.prepare()

    def fits(self, data: Any) -> None:
        super().fits(data)
        if not getattr(self.net, "twin", True) and (self.shares.adv or self.rectify):
            raise UserError(
                "model.net: has no times of a twin, those in (1, 2] are the data's own; expected model.shares.adv=0 "
                "model.rectify=0"
            )
        ranks = self.trainer.world_size
        size, least = getattr(data, "batch_size", None), max(4, self.shares.number)
        if size is not None and size // ranks < least:
            raise UserError(f"data.batch_size: found {size}, expected at least {least * ranks}, {least} on each rank")
        if self.enhanced_ratio and not self.num_classes:
            raise UserError(f"model.enhanced_ratio: found {self.enhanced_ratio}, expected 0 on data without classes")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if (
            stage == "fit"
            and self.shadow is not None
            and isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy)
        ):
            raise UserError(f"model.ema_decay: found {self.ema_decay}, expected 0 with sharded weights (strategy=fsdp)")
        if stage != "predict":
            self.loss.prepare()
        if stage == "fit" and self.shadow is not None:
            self.shadow.reset(self.net)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema_ramp"] = self.ramp

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ramp = checkpoint.get("ema_ramp", 0.0)

    # ------------------------------------------------------------------ training

    def _generate(self, x0: Tensor, cond: Tensor | None) -> Tensor:
        """One-step samples `x_0 + u(x_0, 0, 1)` `(B, ...)`."""
        zero = x0.new_zeros(len(x0))
        return x0 + self.net(x0, zero, cond, zero + 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x1, cond = batch[self.key], self.condition(batch)
        draws = Draws(run_seed(), self.current_epoch, batch["index"])
        if cond is not None and self.condition_dropout:
            cond = self.net.drop_condition(cond, draws.uniform("dropped") < self.condition_dropout)
        terms = self.terms(x1, cond, self.drawn(x1, draws))
        counted = terms.base
        if self.order == 0:
            counted = torch.cat([terms.base[terms.rows[name]] for name in ("mul", "adv")])
        loss = counted.mean()
        if terms.rectify is not None:
            loss = loss + self.rectify * terms.rectify.mean()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            parts = {name: terms.base[rows].mean() for name, rows in terms.rows.items() if rows.start < rows.stop}
            parts |= {"rectify": terms.rectify.mean()} if terms.rectify is not None else {}
            found = {f"train/{name}": value.detach() for name, value in {"loss": loss, **parts}.items()}
            self.log_dict(found, batch_size=len(x1))
        return loss

    def drawn(self, x1: Tensor, draws: Draws) -> StepDraws:
        """Draws for a step on data `(B, ...)`."""
        rows, shape = self.shares.rows(len(x1)), x1.shape[1:]
        noise, scalars = draws.both(("noise", shape), ("time", (4,)), x1.dtype)
        u, reach, near, twin = scalars.unbind(1)
        adv, e2e = (Draws(draws.seed, draws.epoch, draws.index[rows[name]]) for name in ("adv", "e2e"))
        return StepDraws(
            self.times.quantile(u),
            reach,
            near,
            noise,
            adv.normal("adv", shape, x1.dtype),
            e2e.normal("twin", shape, x1.dtype),
            twin[rows["e2e"]],
            draws.normal("free", shape, x1.dtype) if self.image_free else None,
        )

    def terms(self, x1: Tensor, cond: Tensor | None, d: StepDraws, empty: Tensor | None = None) -> Terms:
        """Losses of a training step, which also moves the average of the weights.

        Args:
            x1: Data `(B, ...)`.
            cond: Condition of each sample, or None.
            d: All that is random.
            empty: Conditions `(B, ...)` of the weak side of the guidance; None drops them.
        """
        rows = self.shares.rows(len(x1))
        e2e, adv, real = rows["e2e"], rows["adv"], slice(0, rows["adv"].start)
        t, r = self._times(d, rows)
        with untracked():
            if d.free_noise is not None:
                x1 = self._generate(d.free_noise, cond)
            if adv.start < adv.stop:
                own = self._generate(d.adv_noise, None if cond is None else cond[adv])
                x1 = torch.cat([x1[real], own])
            x_t, velocity = mix(d.noise, x1, t), x1 - d.noise
        u = self.net(x_t, t, cond, r)
        self._move_shadow()
        with untracked():
            velocity = self._guided(velocity, x_t, t, cond, empty, slice(e2e.stop, real.stop))
            target = velocity
            if self.order and self.consistency and real.stop > rows["mul"].stop - rows["mul"].start:
                target = self._any_step(u, velocity, x_t, t, cond, r, real)
            weight = torch.cat([time_weight(t[real], r[real]), torch.ones_like(t[adv])])
        base = self.loss(Regression(u, target, x_t, d.noise, x1, t)) * weight
        if not (self.rectify and self.consistency == 1 and e2e.stop):
            return Terms(base, None, rows, u, target, velocity, None)
        u_e2e, sample = u[e2e], (d.noise[e2e] + u[e2e]).detach()
        gap = self._gap(sample, None if cond is None else cond[e2e], d.twin_noise, d.twin_t)
        pull = Regression(u_e2e, (u_e2e - gap).detach(), x_t[e2e], d.noise[e2e], x1[e2e], t[e2e])
        return Terms(base, self.loss(pull), rows, u, target, velocity, gap)

    def _times(self, d: StepDraws, rows: dict[str, slice]) -> tuple[Tensor, Tensor]:
        """`t` and `r` `(B,)` of all blocks."""
        t = d.t
        reach = {"e2e": torch.ones_like(t), "one": torch.ones_like(t)}
        reach |= {"mul": d.near * min(0.05, self.consistency), "any": d.reach * self.consistency}
        starts = {"e2e": torch.zeros_like(t), "adv": 2 - t}
        t = torch.cat([starts.get(name, t)[at] for name, at in rows.items()])
        way = torch.cat([reach[name][at] if name in reach else torch.zeros_like(t[at]) for name, at in rows.items()])
        return t, t + way * (1 - t)

    def _guided(
        self, velocity: Tensor, x: Tensor, t: Tensor, cond: Tensor | None, empty: Tensor | None, rows: slice
    ) -> Tensor:
        """The velocity with guidance in the `rows` in which it may act (not `e2e`, pure noise, nor `adv`)."""
        if not self.enhanced_ratio or rows.start == rows.stop:
            return velocity
        x, t, c = x[rows], t[rows], cond[rows]
        weak = self.net.drop_condition(c, torch.ones_like(t, dtype=torch.bool)) if empty is None else empty[rows]
        with self._reference():
            u_c, u_e = self.net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([c, weak])).chunk(2)
        own = u_e if self.image_free and self.ema_decay == 1 else velocity[rows]
        low, high = self.enhanced_range
        acts = ((1 - t > low) & (1 - t < high)).reshape(-1, *[1] * (x.ndim - 1))
        found = torch.where(acts, own + self.enhanced_ratio * (u_c - u_e), velocity[rows])
        return torch.cat([velocity[: rows.start], found, velocity[rows.stop :]])

    def _any_step(
        self, u: Tensor, velocity: Tensor, x: Tensor, t: Tensor, cond: Tensor | None, r: Tensor, rows: slice
    ) -> Tensor:
        """The any-step target in the `rows` of real data, the velocity in the others."""
        c = None if cond is None else cond[rows]
        with self._reference() if self.ema_decay < 1 else nullcontext():
            found = rcgm_target(
                lambda x, t, r: self.net(x, t, c, r), u[rows], velocity[rows], x[rows], t[rows], r[rows], self.order
            )
        return torch.cat([found, velocity[rows.stop :]])

    @untracked()
    def _gap(self, sample: Tensor, cond: Tensor | None, noise: Tensor, t: Tensor) -> Tensor:
        """`clamp(u_twin - u_real, -1, 1)` on samples `(n, ...)` at times `(n,)`, in one call of the online network."""
        x = mix(noise, sample, t)
        both = None if cond is None else torch.cat([cond, cond])
        twin, real = self.net(torch.cat([x, x]), torch.cat([2 - t, t]), both).chunk(2)
        return (twin - real).to(torch.promote_types(x.dtype, torch.float32)).clamp(-1, 1)

    def _reference(self) -> AbstractContextManager[None]:
        """Inside, the network has the weights that give targets."""
        return nullcontext() if self.shadow is None else self.shadow.shown(self.net)

    def _move_shadow(self) -> None:
        """`s <- d s + (1 - d) w` with d from 0: `d <- d + (1 - d) (ema_decay - d) / 2` after each update."""
        if self.shadow is not None and self.ema_decay < 1:
            self.shadow.update(self.net, self.ramp)
            self.ramp += (1 - self.ramp) * (self.ema_decay - self.ramp) / 2

    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """Any-step loss of each sample `(B,)` from random t to random r, without guidance: what validation logs."""
        x1, cond = batch[self.key], self.condition(batch)
        noise, scalars = draws.both(("noise", x1.shape[1:]), ("time", (2,)), x1.dtype)
        t = self.times.quantile(scalars[:, 0])
        r = t + scalars[:, 1] * self.consistency * (1 - t)
        x_t = mix(noise, x1, t)
        u = self.net(x_t, t, cond, r)
        target = x1 - noise
        if self.order and self.consistency:
            target = rcgm_target(lambda x, t, r: self.net(x, t, cond, r), u, target, x_t, t, r, self.order)
        return self.loss(Regression(u, target, x_t, noise, x1, t))

    # ------------------------------------------------------------------ sampling

    def jump(self, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None = None) -> Tensor:
        """Carries states `(B, ...)` from `t` to `r` `(B,)` in one call: `x + (r - t) u(x, t, r)`.

        Raises:
            ValueError: a time outside of [0, 1], or r before t.
        """
        if bool((r < t).any()) or bool((t < 0).any()) or bool((r > 1).any()):
            raise ValueError("jump: expected 0 <= t <= r <= 1 in every row (t = 0 noise, t = 1 data)")
        return x + (r - t).reshape(-1, *[1] * (x.ndim - 1)) * self.net(x, t, cond, r)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """As every flow; the noise that the sampler renews belongs to the sample, too."""
        draws, shape, cond = Draws(run_seed(), 0, batch["index"]), tuple(self.net.shape), self.condition(batch)
        renewal = [draws.normal(f"renewal {i}", shape) for i in range(self.predict_steps - 1)]
        x1 = self._sampled(draws.normal("predict", shape), self.predict_steps, cond, renewal=renewal)
        return {"index": batch["index"], self.key: x1} | ({"label": cond} if cond is not None else {})

    def _sampled(self, x0: Tensor, steps: int, cond: Tensor | None, **noise: Any) -> Tensor:
        self.nfe = steps
        return self.sampler(lambda x, t, r: self.net(x, t, cond, r), x0, steps, **noise)[-1]

    def decode(
        self,
        x0: Tensor,
        *,
        steps: int | str | None = None,
        grid: Tensor | None = None,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Carries noise `(B, ...)` to data: `steps` calls of the sampler, or the flow's equation on a `grid`."""
        steps = self.default_steps if steps is None else steps
        if grid is not None or not isinstance(steps, int) or guidance not in (None, 1.0):
            return super().decode(x0, steps=steps, grid=grid, cond=cond, generator=generator, guidance=guidance)
        return self._sampled(x0, steps, cond, generator=generator)
