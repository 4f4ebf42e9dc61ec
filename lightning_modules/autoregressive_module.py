"""What all methods that train an autoregressive flow share: likelihood, sampling block by block, density, denoising."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.affine import Guidance, ScoreGuidance, frame_nll, nll
from penstock.lightning_modules.flow.inverse import Inverse, Jacobi, Sequential, Trace
from penstock.lightning_modules.nets.autoencoder import Autoencoder, Identity
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow, Flow
from penstock.lightning_modules.nets.prompt_template import Tag, tagged
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.prompted import Condition, Prompted
from penstock.lightning_modules.seeds import run_seed
from penstock.lightning_modules.training import check_data, log_mean, net_weights, optimizers, start_from_initial

CacheType = Literal["float32", "bfloat16"]
CONSTANT = 0.5 * math.log(2 * math.pi)


class AutoregressiveModule(LightningModule):
    """A flow from data to noise, trained by its exact likelihood; losses are nats a dimension.

    A method sits directly on this class and names all its arguments.

    Args:
        net: The flow.
        optimizer: Makes the optimiser from the parameters.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        noise: Standard deviation of what is added to the data, which the model then is of.
        penalty: Weight of the mean squares of the noisy data and of what the shallow blocks make of it.
        condition_dropout: Share of the rows whose condition is dropped, in [0, 1].
        guidance: Of the sampler, where there is a condition; None does without.
        inverse: How the deep block is inverted; None is `Jacobi`.
        shallow: How the others are, all alike or each by its own, data side first; None is as the deep one.
        cache: Precision of the caches of keys and values when sampling; None is that of the weights.
        denoise: Whether samples lose the noise by a step along the gradient of the likelihood.
        key: Entry of the batch that holds the data, where no `text` is given.
        initial: Checkpoint whose raw weights training starts from.
        text: Makes this a text-to-image flow: prompts (batch entry `text`) to features.
        autoencoder: With `text`, images to the flow's space and back; None is pixel space.
        prompts: With `text`, prompts by number, for samples that ask for a class.

    Attributes:
        nfe: Calls of blocks that the last samples took, all blocks together; one after the other, so a matter of time.
        traces: What each block took, deep one first.
        told: Gets the tokens that are done, and the calls they took, as samples are made; None is nobody.

    Raises:
        ValueError: an option out of its range.
    """

    default_steps = 32
    net: AutoregressiveFlow

    @property
    def calls_vary(self) -> bool:
        """Whether `nfe` depends on the weights and the noise, and not on `steps` alone: it does but token by token."""
        every = [self.inverse, *(self.shallow if isinstance(self.shallow, list) else [self.shallow or self.inverse])]
        return not all(isinstance(one, Sequential) for one in every)

    def __init__(
        self,
        net: AutoregressiveFlow,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        noise: float,
        penalty: float,
        condition_dropout: float,
        guidance: Guidance | None,
        inverse: Inverse | None,
        shallow: Inverse | list[Inverse] | None,
        cache: CacheType | None,
        denoise: bool,
        key: Literal["image", "video", "latent"],
        initial: str | None,
        text: TextEncoder | None,
        autoencoder: Autoencoder | None,
        prompts: list[str] | None,
    ):
        super().__init__()
        for name, value, most in (("noise", noise, math.inf), ("penalty", penalty, math.inf)):
            if not 0 <= value < most:
                raise ValueError(f"{name}={value}: expected a number of 0 or more")
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout={condition_dropout}: expected a share in [0, 1]")
        if text is None and (autoencoder is not None or prompts):
            raise ValueError("autoencoder and prompts belong to a text-to-image flow: give text, too")
        self.net, self.optimizer, self.scheduler, self.initial = net, optimizer, scheduler, initial
        self.noise, self.penalty, self.condition_dropout = noise, penalty, condition_dropout
        self.guidance, self.inverse, self.denoise = guidance, inverse or Jacobi(), denoise
        if isinstance(shallow, list) and len(shallow) != len(net.blocks) - 1:
            raise ValueError(f"shallow: {len(shallow)} inverses, expected {len(net.blocks) - 1}, one for each block")
        self.shallow, self.cache = shallow, None if cache is None else getattr(torch, cache)
        self.told: Callable[[int, int], None] | None = None
        self.prompted: Prompted | None = None
        if text is not None:
            text = text.of_size(*net.shape[-2:])
            self.prompted = Prompted(text, autoencoder or Identity(), prompts or [])
        self.takes_text = self.prompted is not None
        self.key = key if self.prompted is None else self.prompted.autoencoder.key
        self.num_classes = net.num_classes if self.prompted is None else len(self.prompted.prompts)
        self.nfe, self.traces = 0, []

    # ------------------------------------------------------------------ training

    def fits(self, data: Any) -> None:
        """Refuses a DataModule of another shape, or without the condition.

        Raises:
            UserError: the key of the model, what was found and what is expected.
        """
        if self.prompted is None:
            check_data(self.net, self.num_classes, data, in_sequence=True)
        else:
            self.prompted.fits_text(self.net)
            self._know_null_text()
            self.prompted.fits(self.net, data)

    def _know_null_text(self) -> None:
        if self.prompted is not None and self.net.null_text is None:
            self.net.null_text = self.prompted.null(self.device)[0]

    def precheck(self, data: Any) -> None:
        """Called before `data` is prepared: refuses early what `setup` would refuse later."""
        if self.prompted is not None:
            self.prompted.fits_text(self.net)
        start_from_initial(self)

    def setup(self, stage: str) -> None:
        self.fits(self.trainer.datamodule)
        if stage == "fit":
            start_from_initial(self)

    def initial_weights(self, state: dict[str, Any]) -> dict[str, Any]:
        """The network's weights under its own names, from the state of the module that training starts from."""
        return net_weights(state)

    def data(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """The batch in the flow's space `(B, ...)`."""
        if self.prompted is None:
            return batch[self.key]
        return self.prompted.data(batch, draws)

    def condition(self, batch: dict[str, Any]) -> Tensor | None:
        """What the network is conditioned on, or None."""
        if self.prompted is not None:
            return self.prompted.condition(batch, self.device)
        return batch["label"] if self.num_classes else None

    def losses(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """Negative log-likelihood of each sample with its noise, and the penalty, `(B,)`."""
        return self.nll(self.flow(batch, draws))

    def flow(self, batch: dict[str, Any], draws: Draws) -> Flow:
        """The noisy batch at the noise side."""
        x, cond = self.noisy(batch, draws)
        return self.net(x, cond)

    def noisy(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Data with noise `(B, ...)` and conditions, some of them dropped; all that is random comes from `draws`."""
        x, cond = self.data(batch, draws), self.condition(batch)
        if self.noise:
            x = x + self.noise * draws.normal("noise", x.shape[1:], x.dtype)
        if cond is not None:
            cond = self.dropped(cond, draws.uniform("dropped") < self.condition_dropout, batch)
        return x, cond

    def dropped(self, cond: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """Conditions of a batch, those of `mask` `(B,)` as none."""
        return self.net.drop_condition(cond, mask)

    def nll(self, flow: Flow) -> Tensor:
        """Nats a dimension `(B,)`, and the penalty."""
        return self.penalized(nll(flow.z, flow.logdets) + CONSTANT, flow)

    def penalized(self, nats: Tensor, flow: Flow) -> Tensor:
        """`nats` `(B,)` and the penalty."""
        return nats + self.penalty * mean_squares(flow) if self.penalty else nats

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(batch, Draws(run_seed(), self.current_epoch, batch["index"]))
        loss = losses.mean()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.detach(), batch_size=len(losses))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        log_mean(self, "val/loss", self.losses(batch, Draws(0, 0, batch["index"])))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        log_mean(self, "test/loss", self.losses(batch, Draws(0, 0, batch["index"])))

    def configure_optimizers(self) -> Any:
        return optimizers(self)

    # ------------------------------------------------------------------ density and sampling

    def log_prob(self, x: Tensor, *, cond: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Log-density in nats `(B,)` of data `(B, ...)` as they are; the model is of data with noise, where it has any.

        Args:
            x: Data.
            cond: Condition of each sample; None is the unconditional flow.
            generator: Not used: the likelihood is exact.
        """
        flow = self.net(x, cond)
        return -(nll(flow.z, flow.logdets) + CONSTANT) * x[0].numel()

    def frame_log_prob(self, x: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Log-density in nats of every frame given those before it `(B, T)`, of clips `(B, T, C, H, W)`.

        The sum over frames is `log_prob`; the arguments are the same.
        """
        flow = self.net(x, cond)
        return -(frame_nll(flow.z, flow.logdets) + CONSTANT) * x[0, 0].numel()

    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        cond: Condition | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
        prompt: str | None = None,
    ) -> Tensor:
        """Draws `n` samples `(n, *shape)`.

        Args:
            n: How many.
            steps: The most sweeps of a chunk; None is what `inverse` says. Token by token takes what it takes.
            cond: Classes `(n,)`, or of a text-to-image flow prompts, numbers of `prompts`, or features; None is the
                unconditional flow.
            generator: Source of the noise, on the module's device.
            guidance: Weight instead of the module's own; 0 is none.
            prompt: One prompt for all samples, instead of `cond`.

        Raises:
            UserError: a prompt for a flow that takes none.
        """
        cond = self.asked(n, cond, prompt)
        z = torch.randn(n, *self.net.shape, generator=generator, device=self.device)
        return self._shown(self.decode(z, steps=steps, cond=cond, guidance=guidance))

    def asked(self, n: int, cond: Condition | None, prompt: str | None, tag: Tag | None = None) -> Tensor | None:
        """The condition of `n` samples as the network takes it, see `sample`; captions of a task get its tag.

        Raises:
            UserError: a prompt for a flow that takes none.
        """
        if self.prompted is None:
            if prompt is not None:
                raise UserError(f"prompt={prompt}: the model takes no text")
            return cond
        self._know_null_text()
        if prompt is not None:
            cond = [prompt] * n
        if tag is not None and cond is not None and not (isinstance(cond, Tensor) and cond.is_floating_point()):
            captions = [self.prompted.prompts[i] for i in cond.tolist()] if isinstance(cond, Tensor) else cond
            cond = tagged(captions, tag)
        return self.prompted.features(cond, self.device)

    def decode(
        self, z: Tensor, *, steps: int | None = None, cond: Tensor | None = None, guidance: float | None = None
    ) -> Tensor:
        """Carries noise `(B, ...)` to data, without the noise of training where `denoise`; see `sample`."""
        x = self.inverted(z, steps, cond, guidance)
        return self.tweedie(x, cond) if self.denoise and self.noise else x

    def inverted(
        self, z: Tensor, steps: int | None, cond: Tensor | None, guidance: float | None, **more: Any
    ) -> Tensor:
        """Noise `(B, ...)` through all blocks to noisy data; `more` goes to the network's `decode`.

        Raises:
            UserError: a negative weight of guidance.
        """
        if guidance is not None and guidance < 0:
            raise UserError(f"guidance={guidance:g}: expected 0 or more")
        if self.told is not None:
            self.told(0, 0)
        guide = self.guidance
        if guidance is not None:
            guide = replace(guide or ScoreGuidance(0.0), weight=guidance) if guidance else None
        inverse, shallow = (_swept(how, steps) for how in (self.inverse, self.shallow or self.inverse))
        x, self.traces = self.net.decode(
            self.net.prior(z), inverse, shallow, cond, guide, dtype=self.cache, told=self.told, **more
        )
        self.nfe = sum(trace.calls for trace in self.traces)
        if line := unfinished(self.traces):
            rank_zero_warn(line)
        return x

    def tweedie(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """`x + sigma^2 grad log p(x)`: the mean of the data without noise, for noisy data `(B, ...)`."""
        with torch.inference_mode(False), torch.enable_grad():
            noisy = x.clone().requires_grad_()
            total = self.log_prob(noisy, cond=None if cond is None else cond.clone()).sum()
            (score,) = torch.autograd.grad(total, noisy)
        return x + self.noise**2 * score

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One sample for each condition of the batch."""
        cond = self.condition(batch)
        z = Draws(run_seed(), 0, batch["index"]).normal("predict", tuple(self.net.shape))
        shown = "video" if len(self.net.shape) == 4 else "image"
        name = self.key if self.prompted is None else shown
        found = {"index": batch["index"], name: self._shown(self.decode(z, cond=cond))}
        return found | {k: batch[k] for k in ("label",) if k in batch}

    def _shown(self, x: Tensor) -> Tensor:
        return x if self.prompted is None else self.prompted.autoencoder.decode(x)


def mean_squares(flow: Flow) -> Tensor:
    """Mean squares of the input and of what every block but the last made of it, summed, `(B,)`."""
    return sum(x.square().flatten(1).mean(1) for x in flow.states[:-1])


def _swept(how: Inverse | list[Inverse], steps: int | None) -> Any:
    if isinstance(how, list):
        return [_swept(one, steps) for one in how]
    return how if steps is None or isinstance(how, Sequential) else replace(how, max_sweeps=steps)


def unfinished(traces: Sequence[Trace]) -> str:
    """What to say of chunks that stopped at the largest number of sweeps while they still moved; nothing without any.

    Raises:
        UserError: samples that are not finite.
    """
    number = sum(trace.unfinished for trace in traces)
    if not all(math.isfinite(value) for trace in traces for value in trace.residuals):
        raise UserError("samples are not finite: the iteration diverged; set model.inverse.clamp, or use Sequential")
    if not number:
        return ""
    total = sum(len(trace.sweeps) for trace in traces)
    far, sweeps = max(pair for trace in traces if trace.unfinished for pair in zip(trace.residuals, trace.sweeps))
    return (
        f"samples: {number} of {total} chunks did not reach the tolerance of model.inverse: after {sweeps} sweeps the "
        f"last one moved them by {far**0.5:.2g} of their size; allow more sweeps (steps, max_sweeps) or raise tolerance"
    )
