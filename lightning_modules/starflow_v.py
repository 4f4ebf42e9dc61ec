"""STARFlow-V: "End-to-End Video Generative Modeling with Autoregressive Normalizing Flows" (arXiv 2511.20462)."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from penstock.kernels.philox import Draws
from penstock.lightning_modules.autoregressive_module import CONSTANT, AutoregressiveModule, CacheType
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.affine import Guidance, nll
from penstock.lightning_modules.flow.inverse import Inverse
from penstock.lightning_modules.flow.rollout import chunks, windows
from penstock.lightning_modules.flow.score_matching import ScoreMatching
from penstock.lightning_modules.nets.autoencoder import Autoencoder, Identity
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.prompt_template import tagged
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.prompted import Condition, Prompted
from penstock.lightning_modules.seeds import run_seed
from penstock.lightning_modules.training import log_mean
from penstock.lightning_modules.video_prefix import Request, last_frame_first

Task = Literal["plain", "extend", "last"]
UNIT = 0.3  # what released denoisers count their output in


class STARFlowV(AutoregressiveModule):
    """A flow over clips, causal over frames, and a network that learns its score to take the training noise away.

    Per step, on a noisy clip x: the likelihood of x; and flow-score matching, `mean((d(x) - t)^2)` with
    `t = -(sigma^2 / 0.3) grad log p(x)`, whose gradient reaches the denoiser only. Samples lose the noise by
    `x - 0.3 d(x)`. The score's own gradient is that of the likelihood alone, whatever penalty there is; without one the
    target comes from the likelihood's own backward pass, see `flow.score_matching`.

    A step trains on clips, on clips without their first frame (captions tagged `extend`) or after their last (`last`);
    which one is drawn for all ranks alike. Batches with `source` are clips that follow another (`v2v`); batches of
    `image` are images, in which frames are not hidden from one another.

    Args:
        net: The flow.
        optimizer: Makes the optimiser of the flow and, with a learning rate and betas of its own, of the denoiser.
        denoiser: None has samples lose the noise along the likelihood's own gradient, which is not causal.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        noise: Standard deviation of what is added to the data.
        penalty: Weight of the mean squares of the noisy data and of what the shallow blocks make of it.
        condition_dropout: Share of the clips whose condition is dropped, in [0, 1].
        first_frame_dropout: Share of the steps that leave out the first frame of all clips, in [0, 1].
        last_frame: Share of the steps whose clips come after their last frame, in [0, 1].
        denoiser_lr: Learning rate of the denoiser at the start.
        denoiser_betas: Of its Adam.
        skip_after: Steps after which an update is left out whose gradient, the flow's or the denoiser's, is larger than
            the trainer's `gradient_clip_val`; None never.
        guidance: Of the sampler, where there is a condition; None does without.
        inverse: How the deep block is inverted; None is `Jacobi`.
        shallow: How the others are, all alike or each by its own, data side first; None is as the deep one.
        cache: Precision of the caches of keys and values when sampling; None is that of the weights.
        window: Frames that a long clip is made of at once; None is the network's frames.
        context: Frames that the next ones are made after, in a clip longer than the window.
        initial: Checkpoint whose raw weights training starts from.
        text: Makes this a text-to-video flow: prompts (batch entry `text`) to features.
        autoencoder: With `text`, clips to the flow's space and back; None is pixel space.
        prompts: With `text`, prompts by number, for samples that ask for a class.

    Attributes:
        sourced: Whether it was trained on clips that follow another; None where that is not known.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        net: AutoregressiveFlow,
        optimizer: OptimizerCallable,
        denoiser: FlowDenoiser | None = None,
        scheduler: LRSchedulerCallable | None = None,
        noise: float = 0.5,
        penalty: float = 0.0,
        condition_dropout: float = 0.1,
        first_frame_dropout: float = 0.25,
        last_frame: float = 0.0,
        denoiser_lr: float = 1e-4,
        denoiser_betas: tuple[float, float] = (0.9, 0.999),
        skip_after: int | None = 100,
        guidance: Guidance | None = None,
        inverse: Inverse | None = None,
        shallow: Inverse | list[Inverse] | None = None,
        cache: CacheType | None = None,
        window: int | None = None,
        context: int | None = None,
        initial: str | None = None,
        text: TextEncoder | None = None,
        autoencoder: Autoencoder | None = None,
        prompts: list[str] | None = None,
    ):
        super().__init__(
            net, optimizer, scheduler, noise, penalty, condition_dropout, guidance, inverse, shallow, cache, True,
            "video", initial, text, autoencoder, prompts,
        )  # fmt: skip
        for name, share in (("first_frame_dropout", first_frame_dropout), ("last_frame", last_frame)):
            if not 0 <= share <= 1 or first_frame_dropout + last_frame > 1:
                raise ValueError(f"{name}={share}: expected a share in [0, 1], of both together at most 1")
        self.denoiser, self.first_frame_dropout, self.last_frame = denoiser, first_frame_dropout, last_frame
        self.denoiser_lr, self.denoiser_betas, self.skip_after = denoiser_lr, denoiser_betas, skip_after
        self.window = window or net.shape[0]
        self.context = context or max(1, 3 * self.window // 4)
        if not 0 < self.context < self.window:
            raise ValueError(f"context={context}: expected 1 to {self.window - 1} frames, less than the window")
        self.sourced: bool | None = None
        self.autoencoder = Identity() if self.prompted is None else self.prompted.autoencoder
        self._text, self._prompters = text, {}
        self.matching = ScoreMatching(noise**2 / UNIT)

    def fits(self, data: Any) -> None:
        """Refuses data of another shape, and a denoiser of other tokens than the flow's.

        Raises:
            UserError: the key of the model, what was found and what is expected.
        """
        super().fits(data)
        self._denoiser_fits()

    def precheck(self, data: Any) -> None:
        super().precheck(data)
        self._denoiser_fits()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.sourced = bool(getattr(self.trainer.datamodule, "sourced", False))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sourced"] = self.sourced

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sourced = checkpoint.get("sourced")

    def _denoiser_fits(self) -> None:
        if self.denoiser is None:
            return
        channels, patch = self.net.shape[1], self.net.patch
        if (found := self.denoiser.proj_in.in_features) != channels * patch**2:
            raise UserError(
                f"model.denoiser.channels: found {found}, expected {channels * patch**2}: {channels} channels in "
                f"patches of {patch}x{patch}, as model.net has them"
            )
        if self.denoiser.text_dim not in (0, self.net.text_dim):
            raise UserError(
                f"model.denoiser.text_dim: found {self.denoiser.text_dim}, expected 0 or {self.net.text_dim}, that of "
                "model.net"
            )

    # ------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        draws, task = Draws(run_seed(), self.current_epoch, batch["index"]), self.task(batch, batch_idx)
        x, cond = self.noisy({**batch, "task": task}, draws)
        x = x[:, 1:] if task == "extend" else x
        d = None if self.denoiser is None else self.score(x, cond)
        once = d is not None and not self.penalty
        x = self.matching.enter(x, d) if once else x.requires_grad_(d is not None)
        flow = self.net(x, cond)
        nats = nll(flow.z, flow.logdets) + CONSTANT
        loss = self.penalized(nats, flow).mean()
        if self._logs_now:
            self.log("train/loss", loss.detach(), batch_size=len(x))
        if once:
            return self.matching.leave(loss)
        return loss if d is None else loss + self.matching.apart(nats.mean(), x, d)

    def on_after_backward(self) -> None:
        if self.denoiser is not None and self._logs_now:
            self.log("train/denoiser", self.matching.loss)

    @property
    def _logs_now(self) -> bool:
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def task(self, batch: dict[str, Any], batch_idx: int) -> Task:
        """What a step trains, drawn from (seed, epoch, batch) for all ranks alike."""
        data = of_batch(batch)
        if data is None or data.ndim < 5 or data.shape[1] < 2 or "source" in batch:
            return "plain"
        share = float(Draws(run_seed(), self.current_epoch, torch.tensor([batch_idx])).uniform("task")[0])
        if share < self.first_frame_dropout:
            return "extend"
        return "last" if share < self.first_frame_dropout + self.last_frame else "plain"

    def data(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """See `AutoregressiveModule.data`.

        Raises:
            UserError: latents where the last frame has to be encoded on its own.
        """
        if batch.get("task") == "last":
            if "video" not in batch:
                raise UserError("model.last_frame: batches hold latents; expected videos, whose last frame is encoded")
            noise = None if self.prompted is None else self.prompted.noise(batch["video"], draws)
            return last_frame_first(batch["video"], self.autoencoder, self.autoencoder.frame_factor, noise)
        x = batch.get("video", batch.get("image")) if self.prompted is None else super().data(batch, draws)
        return torch.cat([self.autoencoder.encode(batch["source"]), x], 1) if "source" in batch else x

    def condition(self, batch: dict[str, Any]) -> Tensor | None:
        if self.prompted is None or "text" not in batch:
            return super().condition(batch)
        tag = "v2v" if "source" in batch else batch.get("task", "plain")
        captions = batch["text"] if tag == "plain" else tagged(batch["text"], tag)
        return self._prompted_of(batch).condition({"text": captions}, self.device)

    def dropped(self, cond: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        if self.prompted is None:
            return super().dropped(cond, mask, batch)
        return torch.where(mask[:, None, None], self._prompted_of(batch).null(self.device), cond)

    def _prompted_of(self, batch: dict[str, Any]) -> Prompted:
        """Prompts of clips, or of images, of a batch's own aspect; a batch of prompts alone has the network's."""
        data = of_batch(batch)
        if data is None:
            return self.prompted
        key = data.ndim, *data.shape[-2:]
        if key not in self._prompters:
            text = (self._text if data.ndim == 5 else self._text.of_images()).of_size(*data.shape[-2:])
            self._prompters[key] = Prompted(text, self.autoencoder, self.prompted.prompts)
        return self._prompters[key]

    def score(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """`d(x)`, shape of the noisy clips `x` `(B, T, C, H, W)`, or images `(B, C, H, W)`."""
        tokens, grid = self.net.tokens(x)
        text = self.net.condition(cond, len(x)) if self.denoiser.text_dim else None
        return self.net.untokens(self.denoiser(tokens, grid, text, x.ndim == 5), grid, x.ndim == 5)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Also the mean squared distance from the data of what has the noise, and of what has lost it."""
        super().test_step(batch, batch_idx)
        if self.noise:
            draws = Draws(0, 0, batch["index"])
            x, cond = self.data(batch, draws), self.condition(batch)
            noisy = x + self.noise * draws.normal("noise", x.shape[1:], x.dtype)
            for name, found in (("noisy_mse", noisy), ("denoised_mse", self.clean(noisy, cond))):
                log_mean(self, name, (found - x).square().flatten(1).mean(1))

    def configure_optimizers(self) -> Any:
        if self.denoiser is None:
            return super().configure_optimizers()
        groups = [{"params": [p for p in self.net.parameters() if p.requires_grad]}]
        own = {"lr": self.denoiser_lr, "betas": self.denoiser_betas}
        groups.append({"params": list(self.denoiser.parameters()), **own})
        optimizer = self.optimizer(groups)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the flow's and the denoiser's gradients each by its norm; later on leaves such updates out.

        Logs whether it did as `train/left_out`, 1 or 0: a run whose gradients are never small would stand still.
        """
        if not gradient_clip_val:
            return
        groups = [group["params"] for group in optimizer.param_groups]
        norms = torch.stack([torch.nn.utils.clip_grad_norm_(group, gradient_clip_val) for group in groups])
        skip = self.skip_after is not None and self.global_step >= self.skip_after
        left_out = (norms > gradient_clip_val).any() if skip else torch.zeros_like(norms[0], dtype=torch.bool)
        leave_out(optimizer, left_out)
        if skip and self._logs_now:
            self.log("train/left_out", left_out.float())

    @property
    def pixels(self) -> tuple[int, int, int]:
        """(C, H, W) of a frame that is seen, decoded where there is an autoencoder."""
        channels, height, width = self.net.shape[1:]
        if self.autoencoder.key != "latent":
            return channels, height, width
        factor = 256 // self.autoencoder.latent_shape((3, 256, 256))[-1]
        return 3, factor * height, factor * width

    # ------------------------------------------------------------------ sampling

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One clip for each condition of the batch, after its source where there is one."""
        if "source" not in batch:
            return super().predict_step(batch, batch_idx)
        draws, source = Draws(run_seed(), 0, batch["index"]), self.autoencoder.encode(batch["source"])
        known = source + self.noise * draws.normal("predict_source", tuple(source.shape[1:]))
        x = self.decode(draws.normal("predict", tuple(self.net.shape)), cond=self.condition(batch), known=known)
        made = self.autoencoder.decode(x[:, source.shape[1] :])
        return {"index": batch["index"], "source": batch["source"], "video": made}

    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        cond: Condition | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
        prompt: str | None = None,
        frames: int | None = None,
        image: str | None = None,
        video: str | None = None,
        last: str | None = None,
        source: str | Tensor | None = None,
        given: int | None = None,
        fps: float | None = None,
    ) -> Tensor:
        """Draws `n` clips `(n, T, C, H, W)`; see `AutoregressiveModule.sample`.

        Frames that are given come back as they are; the flow goes on from them with the noise of training.

        Args:
            n: How many.
            steps: The most sweeps of a chunk; None is what `inverse` says.
            cond: Condition of each clip.
            generator: Source of the noise, on the module's device.
            guidance: Weight instead of the module's own; 0 is none.
            prompt: One prompt for all clips, instead of `cond`.
            frames: T of the flow's space; None is the network's. More than the window are made window after window.
            image: File of a picture that clips begin with.
            video: File or folder of a clip that they begin with, frame by frame; it is what their start is made from.
            last: File of a picture that they end with.
            source: File or folder of a clip that they are translated from, or such clips `(n, T, C, H, W)`: half of the
                network's frames, of a file the first ones.
            given: Frames that are taken of `video`, the first ones; None is all.
            fps: Rate at which frames of files are taken; None is the files' own frames.

        Raises:
            UserError: files that exclude each other, no frame left to make, or a file that cannot be read.
        """
        if frames is not None and frames < 1:
            raise UserError(f"frames={frames}: expected a whole number of 1 or more")
        request, frames = Request(image, video, last, source, given, fps), frames or self.net.shape[0]
        if last is not None and not self.last_frame:
            rank_zero_warn(f"last={last}: the model has model.last_frame=0, so it never learnt to end with a picture")
        if isinstance(source, str) and self.sourced is False:
            rank_zero_warn(
                f"source={source}: its data had no sources, so the model never learnt to follow another clip"
            )
        begun, known = request.known(self.pixels, self.autoencoder, self.device, frames), None
        number = 0 if begun is None else begun.shape[1]
        request.check(number, frames, self.window)
        if begun is not None:
            shape = (n, *begun.shape[1:])
            known = begun + self.noise * torch.randn(shape, generator=generator, device=self.device)
        z = torch.randn(n, frames, *self.net.shape[1:], generator=generator, device=self.device)
        own = self.asked(n, cond, prompt, request.tag)
        later = self.asked(n, cond, prompt, "extend") if self.first_frame_dropout and frames > self.window else own
        x = self.decode(z, steps=steps, cond=own, later=later, guidance=guidance, known=known)
        if begun is not None:
            x = torch.cat([begun.expand(n, -1, -1, -1, -1), x[:, number:]], 1)
        return request.shown(x, number, self.autoencoder)

    def decode(
        self,
        z: Tensor,
        *,
        steps: int | None = None,
        cond: Tensor | None = None,
        later: Tensor | None = None,
        guidance: float | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Carries noise `(B, T, C, H, W)` to clips without the noise of training.

        Args:
            z: Noise, of any number of frames.
            steps: See `sample`.
            cond: Condition of each clip, as features.
            later: The same of windows after the first; None is as the first.
            guidance: See `sample`.
            known: The first frames with their noise `(B, K, C, H, W)`, fewer than a window.
        """
        pieces = windows(z.shape[1], self.window, self.context)
        x = self.inverted(z, steps, cond, guidance, known=known, windows=pieces, later=later)
        return self.clean(x, cond) if self.noise else x

    def clean(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Noisy clips `(B, T, C, H, W)` without their noise: by the denoiser, or by `tweedie`.

        Clips longer than the window go through the denoiser in chunks, all from the noisy clip, where every frame has
        as many before it as one layer sees, and what it looks ahead.
        """
        if self.denoiser is None:
            return self.tweedie(x, cond)
        behind, ahead = self.denoiser.window or self.window // 2, self.denoiser.ahead
        size = max(self.window, behind + ahead + 1)
        out = torch.empty_like(x)
        for start, first, last, end in chunks(x.shape[1], size, behind, ahead):
            d = self.score(x[:, start:end], cond)[:, first - start : last - start]
            out[:, first:last] = x[:, first:last] - UNIT * d
        return out


def of_batch(batch: dict[str, Any]) -> Tensor | None:
    """The clips `(B, T, C, H, W)`, or images `(B, C, H, W)`, of a batch, of pixels or latents; None without any."""
    return next((batch[key] for key in ("video", "image", "latent") if key in batch), None)


def leave_out(optimizer: Optimizer, wanted: Tensor) -> None:
    """Has the next step of `optimizer` change nothing, its averages included, where `wanted` is true.

    A fused optimiser is told on the device; another one needs the answer on the host.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, wanted.float()
    elif bool(wanted):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = None
