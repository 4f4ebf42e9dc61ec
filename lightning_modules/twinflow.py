"""TwinFlow: "Realizing One-step Generation on Large Models with Self-adversarial Flows" (arXiv 2512.05150)."""

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.any_step import STEP
from penstock.lightning_modules.flow.any_step_sampler import AnyStepSampler
from penstock.lightning_modules.flow.barron import Barron
from penstock.lightning_modules.flow.blocks import Shares
from penstock.lightning_modules.flow.losses import FlowLoss
from penstock.lightning_modules.flow.times import TimeSampler, Uniform
from penstock.lightning_modules.flow.twinflow import StepDraws, Terms, TwinObjective, one_step
from penstock.lightning_modules.flow_module import FlowModule, Key
from penstock.lightning_modules.nets import lora
from penstock.lightning_modules.nets.any_step import AnyStep
from penstock.lightning_modules.nets.autoencoder import Autoencoder, Identity
from penstock.lightning_modules.nets.shadow import Shadow
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.prompted import Condition, Prompted
from penstock.lightning_modules.seeds import run_seed


class TwinFlow(FlowModule):
    """An any-step flow that is its own critic: `u(x, t, r)` carries x from t to r > t; t = 0 is noise, t = 1 data.

    The batch is cut into blocks (section 3.3 and official code), which take turns in it, each with times of its own:

    | block | t | r | data | target |
    |---|---|---|---|---|
    | `e2e` | 0 | 1 | real | any-step, and the rectification |
    | `mul` | random | at most `near` of the way to 1 | real | any-step |
    | `any` | random | random | real | any-step |
    | `one` | random | 1 | real | any-step |
    | `adv` | 2 - t | t | own one-step samples | `x_1 - x_0` |

    Any-step target: recursive consistency of order N (eq. 5, `flow.any_step.rcgm_target`). The rows of `adv` teach the
    network, at times in (1, 2], the velocity of its own samples (eq. 8); where it differs from the velocity of the
    data, the one-step samples move by that difference (rectification, eqs. 9 to 11): `u(x_0, 0, 1)` is drawn to
    `u - clamp(u_twin - u_real, -1, 1)`, both on samples with fresh noise.

    Order 0 is flow matching: only `mul` and `adv` count; exactly so with `consistency=0`, and it is sampled with
    `sampler.style=mul sampler.noise=0`. Shares of 0 leave a block out: without `adv` and with `rectify=0` this is RCGM;
    `order=1` with `one` alone a consistency model, with `any` alone MeanFlow's condition; `first_step=0 near=0` with
    `mul` and `any` a shortcut model.

    Args:
        net: `net(x, t, cond)`, which gets a second time embedding, or `net(x, t, cond, r)`.
        optimizer: Makes the optimiser from the parameters that train.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        times: Law of t; None is uniform.
        loss: What a prediction costs; None is Barron's reweighting.
        sampler: Of `sample` with a number of steps; None re-noises after a jump to the data (`few`).
        order: N, the steps of the target's chain.
        first_step: D, how far the chain follows the data's velocity first, in [0, 1); 0 leaves that out.
        near: How far `mul` reaches at most, as a share of the way to 1, in [0, 1]; 0 is flow matching.
        consistency: How far `any` reaches, in [0, 1]; the rectification acts at 1 only, and at 0 all is flow matching.
        shares: Relative sizes of the blocks.
        rectify: Weight of the rectification; 0 leaves it out.
        enhanced_ratio: w, guidance that the weights learn: `v + w (u_c - u_e)`, a scale of `1 / (1 - w)`.
        enhanced_range: Shares of noise (a, b) between which, both excluded, it acts.
        ema_decay: Of the weights that give targets: 0 is the network itself, 1 its weights at the start (a frozen
            teacher, for the guidance only); between, the average's decay rises from 0.
        image_free: Learn from the network's own samples; of the batch only the condition is read.
        condition_dropout: Share of the rows whose condition is dropped, so that `u_e` learns, in [0, 1].
        key: Entry of the batch that holds the data, where no `text` is given.
        initial: Checkpoint whose raw weights training starts from: of this method, or of a flow with one time.
        lora_rank: 0 trains all weights; r trains low-rank parts of that rank only.
        lora_alpha: Strength of the low-rank parts.
        text: Makes this a text-to-image flow: prompts (batch entry `text`) to features.
        autoencoder: With `text`, images to the flow's space and back; None is pixel space.
        prompts: With `text`, prompts by number, for samples that ask for a class.

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
        first_step: float = STEP,
        near: float = 0.05,
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
        text: TextEncoder | None = None,
        autoencoder: Autoencoder | None = None,
        prompts: list[str] | None = None,
    ):
        any_step = net if "r" in inspect.signature(net.forward).parameters else AnyStep(net)
        prompted = None if text is None else Prompted(text, autoencoder or Identity(), prompts or [])
        key = key if prompted is None else prompted.autoencoder.key
        super().__init__(any_step, optimizer, scheduler, None, None, 0.0, 1.0, key, initial)
        if order < 0:
            raise ValueError(f"order={order}: expected 0 (flow matching) or more")
        if not 0 <= first_step < 1:
            raise ValueError(f"first_step={first_step}: expected a number in [0, 1)")
        if order == 1 and not first_step:
            raise ValueError("first_step=0: expected order=2 or more, one step would be compared with itself")
        for name, value in (("near", near), ("consistency", consistency), ("ema_decay", ema_decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: expected a number in [0, 1]")
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout={condition_dropout}: expected a share in [0, 1]")
        for name, value in (("rectify", rectify), ("enhanced_ratio", enhanced_ratio)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: expected a number of 0 or more")
        if lora_rank and not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={lora_alpha}: expected a number above 0")
        if enhanced_ratio >= 1 > ema_decay:
            raise ValueError(
                f"enhanced_ratio={enhanced_ratio}: expected below 1 (a scale of 1 / (1 - ratio)), or ema_decay=1.0, "
                f"a frozen teacher"
            )
        if not 0 <= enhanced_range[0] < enhanced_range[1] <= 1:
            raise ValueError(f"enhanced_range={list(enhanced_range)}: expected shares of noise, ascending, in [0, 1]")
        if text is None and (autoencoder is not None or prompts):
            raise ValueError("autoencoder and prompts belong to a text-to-image flow: give text, too")
        self.times, self.loss, self.sampler = times or Uniform(0.0), loss or Barron(), sampler or AnyStepSampler()
        self.objective = TwinObjective(
            self.loss, order, consistency, shares, rectify > 0, enhanced_ratio, tuple(enhanced_range), image_free,
            ema_decay == 1, first_step, near,
        )  # fmt: skip
        self.rectify, self.ema_decay = rectify, ema_decay
        self.condition_dropout, self.lora_rank = condition_dropout, lora_rank
        self.prompted, self.takes_text = prompted, prompted is not None
        if prompted is not None:
            self.num_classes = len(prompted.prompts)
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

    def fits(self, data: Any) -> None:
        if self.prompted is None:
            super().fits(data)
        else:
            self.prompted.fits(self.net, data)
        shares, ranks, size = self.objective.shares, self.trainer.world_size, getattr(data, "batch_size", None)
        if not getattr(self.net, "twin", True) and (shares.adv or self.rectify):
            raise UserError(
                "model.net: has no times of a twin, those in (1, 2] are the data's own; expected model.shares.adv=0 "
                "model.rectify=0"
            )
        if self.rectify and not shares.adv:
            raise UserError(f"model.rectify: found {self.rectify}, expected 0 with model.shares.adv=0: no twin learns")
        if not self.objective.order and not shares.mul + shares.adv:
            raise UserError("model.shares: found neither mul nor adv, expected one: model.order=0 counts no other")
        least = max(4, shares.number)
        if size is not None and size // ranks < least:
            raise UserError(f"data.batch_size: found {size}, expected at least {least * ranks}, {least} on each rank")
        if self.objective.enhanced_ratio and not (self.num_classes or self.prompted):
            ratio = self.objective.enhanced_ratio
            raise UserError(f"model.enhanced_ratio: found {ratio}, expected 0 for a flow without a condition")

    def precheck(self, data: Any) -> None:
        super().precheck(data)
        self.loss.prepare()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict":
            self.loss.prepare()
        if stage == "fit" and self.shadow is not None:
            if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
                raise UserError(f"model.ema_decay: found {self.ema_decay}, expected 0 with weights in shards")
            self.shadow.reset(self.net)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema_ramp"] = self.ramp

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ramp = checkpoint.get("ema_ramp", 0.0)

    # ------------------------------------------------------------------ training

    def condition(self, batch: dict[str, Any]) -> Tensor | None:
        return super().condition(batch) if self.prompted is None else self.prompted.condition(batch, self.device)

    def _data(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        if self.objective.image_free:
            return torch.zeros(len(batch["index"]), *self.net.shape, device=self.device)
        if self.prompted is None:
            return batch[self.key]
        return self.prompted.data(batch, draws)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        draws = Draws(run_seed(), self.current_epoch, batch["index"])
        x1, cond = self._data(batch, draws), self.condition(batch)
        if cond is not None:
            cond = self.net.drop_condition(cond, draws.uniform("dropped") < self.condition_dropout)
        order = torch.tensor(self.objective.shares.in_turn(len(x1))).to(x1.device, non_blocking=True)
        x1, cond = x1[order], None if cond is None else cond[order]
        terms = self.terms(x1, cond, self.drawn(x1, Draws(draws.seed, draws.epoch, draws.index[order])))
        counted = terms.base
        if self.objective.order == 0:
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
        rows, shape = self.objective.shares.rows(len(x1)), x1.shape[1:]
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
            draws.normal("free", shape, x1.dtype) if self.objective.image_free else None,
        )

    def terms(self, x1: Tensor, cond: Tensor | None, d: StepDraws, empty: Tensor | None = None) -> Terms:
        """Losses of a training step, see `TwinObjective.terms`; moves the average of the weights, too."""
        return self.objective.terms(self.net, x1, cond, d, empty, self._reference, self._move_shadow)

    def _reference(self) -> AbstractContextManager[None]:
        """Inside, the network has the weights that give targets."""
        return nullcontext() if self.shadow is None else self.shadow.shown(self.net)

    def _move_shadow(self) -> None:
        """`s <- d s + (1 - d) w` with d from 0: `d <- d + (1 - d) (ema_decay - d) / 2` after each update."""
        if self.shadow is not None and self.ema_decay < 1:
            self.shadow.update(self.net, self.ramp)
            self.ramp += (1 - self.ramp) * (self.ema_decay - self.ramp) / 2

    def losses(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """Any-step loss of each sample `(B,)` from random t to random r, without guidance: what validation logs."""
        x1, cond = self._data(batch, draws), self.condition(batch)
        if self.objective.image_free:
            x1 = one_step(self.net, draws.normal("free", x1.shape[1:]), cond).detach()
        noise, scalars = draws.both(("noise", x1.shape[1:]), ("time", (2,)), x1.dtype)
        t = self.times.quantile(scalars[:, 0])
        r = t + scalars[:, 1] * self.objective.consistency * (1 - t)
        return self.objective.any_step(self.net, noise, x1, t, r, cond)

    # ------------------------------------------------------------------ sampling

    def jump(self, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None = None) -> Tensor:
        """Carries states `(B, ...)` from `t` to `r` `(B,)` in one call: `x + (r - t) u(x, t, r)`.

        Raises:
            ValueError: a time outside of [0, 1], or r before t.
        """
        if not bool(((t >= 0) & (r >= t) & (r <= 1)).all()):
            raise ValueError("jump: expected 0 <= t <= r <= 1 in every row (t = 0 noise, t = 1 data)")
        return x + (r - t).reshape(-1, *[1] * (x.ndim - 1)) * self.net(x, t, cond, r)

    def sample(
        self,
        n: int,
        *,
        steps: int | str | None = None,
        grid: Tensor | None = None,
        cond: Condition | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
        prompt: str | None = None,
    ) -> Tensor:
        """Draws `n` samples: with a number of steps by the sampler, one call each; see `FlowModule.sample`.

        Args:
            n: How many.
            steps: Network calls, or `bellman:K` for the flow's equation.
            grid: Times of the flow's equation.
            cond: Classes `(n,)`; of a text-to-image flow prompts, numbers of `prompts`, or features.
            generator: Source of the noise.
            guidance: Other than 1, guidance of the flow's equation; the weights have theirs in them.
            prompt: One prompt for all samples, instead of `cond`.

        Raises:
            UserError: a prompt for a flow that takes none.
        """
        if self.prompted is None:
            if prompt is not None:
                raise UserError(f"prompt={prompt}: the model takes no text")
            features = cond
        else:
            features = self.prompted.features([prompt] * n if prompt is not None else cond, self.device)
        x1 = super().sample(n, steps=steps, grid=grid, cond=features, generator=generator, guidance=guidance)
        return self._shown(x1)

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

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """As every flow; the noise that the sampler renews belongs to the sample, too."""
        draws, shape, cond = Draws(run_seed(), 0, batch["index"]), tuple(self.net.shape), self.condition(batch)
        renewal = [draws.normal(f"renewal {i}", shape) for i in range(self.predict_steps - 1)]
        x1 = self._shown(self._sampled(draws.normal("predict", shape), self.predict_steps, cond, renewal=renewal))
        name = self.key if self.prompted is None else "image"
        return {"index": batch["index"], name: x1} | {k: batch[k] for k in ("label",) if k in batch}

    def _sampled(self, x0: Tensor, steps: int, cond: Tensor | None, **noise: Any) -> Tensor:
        self.nfe = steps
        return self.sampler(lambda x, t, r: self.net(x, t, cond, r), x0, steps, **noise)[-1]

    def _shown(self, x1: Tensor) -> Tensor:
        return x1 if self.prompted is None else self.prompted.autoencoder.decode(x1)
