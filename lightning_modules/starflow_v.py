"""STARFlow-V: "End-to-End Video Generative Modeling with Autoregressive Normalizing Flows" (arXiv 2511.20462)."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from penstock.datamodules.video_clips import fitted
from penstock.datamodules.video_readers import open_video
from penstock.kernels.philox import Draws
from penstock.lightning_modules.autoregressive_module import CONSTANT, AutoregressiveModule, mean_squares
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.affine import Guidance, nll
from penstock.lightning_modules.flow.inverse import Inverse
from penstock.lightning_modules.flow.rollout import chunks, windows
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.prompted import Condition
from penstock.lightning_modules.seeds import run_seed

UNIT = 0.3  # what released denoisers count their output in


class STARFlowV(AutoregressiveModule):
    """A flow over clips, causal over frames, and a network that learns its score to take the training noise away.

    Per step, on a noisy clip x: the likelihood of x; and flow-score matching, `mean((d(x) - t)^2)` with
    `t = -(sigma^2 / 0.3) grad log p(x)`, whose gradient reaches the denoiser only. Samples lose the noise by
    `x - 0.3 d(x)`. The score's own gradient is that of the likelihood alone, whatever penalty there is.

    Args:
        net: The flow.
        optimizer: Makes the optimiser of the flow and, with a learning rate and betas of its own, of the denoiser.
        denoiser: None has samples lose the noise along the likelihood's own gradient, which is not causal.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        noise: Standard deviation of what is added to the data.
        penalty: Weight of the mean squares of the noisy data and of what the shallow blocks make of it.
        condition_dropout: Share of the clips whose condition is dropped, in [0, 1].
        first_frame_dropout: Share of the steps that leave out the first frame of all clips, in [0, 1].
        denoiser_lr: Learning rate of the denoiser at the start.
        denoiser_betas: Of its Adam.
        skip_after: Steps after which an update is left out whose gradient, the flow's or the denoiser's, is larger than
            the trainer's `gradient_clip_val`; None never.
        guidance: Of the sampler, where there is a condition; None does without.
        inverse: How the deep block is inverted; None is `Jacobi`.
        shallow: How the others are; None is as the deep one.
        window: Frames that a long clip is made of at once; None is the network's frames.
        context: Frames that the next ones are made after, in a clip longer than the window.
        initial: Checkpoint whose raw weights training starts from.
        text: Makes this a text-to-video flow: prompts (batch entry `text`) to features.
        autoencoder: With `text`, clips to the flow's space and back; None is pixel space.
        prompts: With `text`, prompts by number, for samples that ask for a class.

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
        denoiser_lr: float = 1e-4,
        denoiser_betas: tuple[float, float] = (0.9, 0.999),
        skip_after: int | None = 100,
        guidance: Guidance | None = None,
        inverse: Inverse | None = None,
        shallow: Inverse | None = None,
        window: int | None = None,
        context: int | None = None,
        initial: str | None = None,
        text: TextEncoder | None = None,
        autoencoder: Autoencoder | None = None,
        prompts: list[str] | None = None,
    ):
        super().__init__(
            net, optimizer, scheduler, noise, penalty, condition_dropout, guidance, inverse, shallow, True, "video",
            initial, text, autoencoder, prompts,
        )  # fmt: skip
        if not 0 <= first_frame_dropout <= 1:
            raise ValueError(f"first_frame_dropout={first_frame_dropout}: expected a share in [0, 1]")
        self.denoiser, self.first_frame_dropout = denoiser, first_frame_dropout
        self.denoiser_lr, self.denoiser_betas, self.skip_after = denoiser_lr, denoiser_betas, skip_after
        self.window = window or net.shape[0]
        self.context = context or max(1, 3 * self.window // 4)
        if not 0 < self.context < self.window:
            raise ValueError(f"context={context}: expected 1 to {self.window - 1} frames, less than the window")

    # ------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        draws = Draws(run_seed(), self.current_epoch, batch["index"])
        shared = Draws(run_seed(), self.current_epoch, torch.tensor([batch_idx], device=self.device))
        x, cond = self.noisy(batch, draws)
        if bool(shared.uniform("first frame")[0] < self.first_frame_dropout) and x.shape[1] > 1:
            x = x[:, 1:]
        x = x.requires_grad_(self.denoiser is not None)
        flow = self.net(x, cond)
        own = nll(flow.z, flow.logdets) + CONSTANT
        loss = own.mean() + self.penalty * mean_squares(flow).mean()
        found = {"train/loss": loss}
        if self.denoiser is not None:
            (slope,) = torch.autograd.grad(own.sum() * x[0].numel(), x, retain_graph=True)
            target = self.noise**2 / UNIT * slope
            found["train/denoiser"] = (self.score(x.detach(), cond) - target).square().mean()
            loss = loss + found["train/denoiser"]
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log_dict({name: value.detach() for name, value in found.items()}, batch_size=len(x))
        return loss

    def score(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """`d(x)`, shape of the noisy clips `x` `(B, T, C, H, W)`."""
        tokens, grid = self.net.tokens(x)
        text = self.net.condition(cond, len(x)) if self.denoiser.text_dim else None
        return self.net.untokens(self.denoiser(tokens, grid, text, x.ndim == 5), grid, x.ndim == 5)

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
        """Clips the flow's and the denoiser's gradients each by its norm; later on leaves such updates out."""
        if not gradient_clip_val:
            return
        groups = [group["params"] for group in optimizer.param_groups]
        norms = torch.stack([torch.nn.utils.clip_grad_norm_(group, gradient_clip_val) for group in groups])
        skip = self.skip_after is not None and self.global_step >= self.skip_after
        left_out = (norms > gradient_clip_val).any() if skip else torch.zeros_like(norms[0], dtype=torch.bool)
        leave_out(optimizer, left_out)

    @property
    def pixels(self) -> tuple[int, int, int]:
        """(C, H, W) of a frame that is seen, decoded where there is an autoencoder."""
        channels, height, width = self.net.shape[1:]
        if self.prompted is None or self.prompted.autoencoder.key != "latent":
            return channels, height, width
        factor = 256 // self.prompted.autoencoder.latent_shape((3, 256, 256))[-1]
        return 3, factor * height, factor * width

    # ------------------------------------------------------------------ sampling

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
    ) -> Tensor:
        """Draws `n` clips `(n, T, C, H, W)`; see `AutoregressiveModule.sample`.

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

        Raises:
            UserError: a picture and a clip, no frame left to make, or a file that cannot be read.
        """
        if self.prompted is not None:
            cond = self.prompted.features([prompt] * n if prompt is not None else cond, self.device)
        elif prompt is not None:
            raise UserError(f"prompt={prompt}: the model takes no text")
        if image is not None and video is not None:
            raise UserError(f"image={image} and video={video}: expected one of them")
        frames = frames or self.net.shape[0]
        known = None if image is None and video is None else self._prefix(image, video, n, generator)
        if known is not None and known.shape[1] >= min(frames, self.window):
            most = min(frames, self.window) - 1
            raise UserError(f"video={video}: {known.shape[1]} frames, expected at most {most} before the new ones")
        z = torch.randn(n, frames, *self.net.shape[1:], generator=generator, device=self.device)
        return self._shown(self.decode(z, steps=steps, cond=cond, guidance=guidance, known=known))

    def decode(
        self,
        z: Tensor,
        *,
        steps: int | None = None,
        cond: Tensor | None = None,
        guidance: float | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Carries noise `(B, T, C, H, W)` to clips without the noise of training.

        Args:
            z: Noise, of any number of frames.
            steps: See `sample`.
            cond: Condition of each clip, as features.
            guidance: See `sample`.
            known: The first frames with their noise `(B, K, C, H, W)`, fewer than a window.
        """
        pieces = windows(z.shape[1], self.window, self.context)
        x = self.inverted(z, steps, cond, guidance, known=known, windows=pieces)
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

    def _prefix(self, image: str | None, video: str | None, n: int, generator: torch.Generator | None) -> Tensor:
        path = Path(image or video or "").expanduser()
        reader = open_video(path)
        channels, height, width = self.pixels
        rows = torch.arange(1 if image is not None else reader.count).numpy()
        frames = fitted(reader.frames(rows).float() / 127.5 - 1, height, width).clamp(-1, 1)
        frames = frames.mean(1, keepdim=True) if channels == 1 else frames
        x = frames[None].to(self.device)
        if self.prompted is not None:
            x = self.prompted.autoencoder.encode(x)
        noise = torch.randn(n, *x.shape[1:], generator=generator, device=self.device)
        return x + self.noise * noise


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
