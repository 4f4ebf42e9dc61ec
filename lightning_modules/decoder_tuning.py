"""Tuning of a decoder on noisy latents, which then takes the noise of a flow's samples away (arXiv 2506.06276)."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.ranks import rank_and_world, sum_over_ranks
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.adversarial import haar_distance, hinge, lecam
from penstock.lightning_modules.flow.premetrics import Distance, for_distance
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.patch_discriminator import PatchDiscriminator
from penstock.lightning_modules.perceptual import LPIPS, Logits
from penstock.lightning_modules.seeds import run_seed
from penstock.lightning_modules.training import log_mean, optimizers


class DecoderTuning(LightningModule):
    """Trains the decoder of an autoencoder on `E(x) + sigma eps` to give x back; the encoder stays as it is.

    The loss of the decoder, pictures in [0, 1]: `l2 |x - y|^2 + lpips LPIPS + logits Logits - adversarial E D(y)`, and
    for clips `wavelet |Haar(x - y)|`; every frame is a picture. The discriminator's: `hinge + lecam LeCam`, whose
    running means have the factor 0.999. A weight of 0 leaves a term out, and needs no file for it.

    Neither has a gradient of the other's loss, and the discriminator judges pictures that were made before the
    decoder's step. One optimiser of both, Adam at least, is therefore the same as two, one after the other. The
    released loop lets the discriminator's learning rate grow over one epoch only; here both have one schedule.
    `weights.latents.Latents(path, tuned=<checkpoint>)` decodes with the result.

    Args:
        autoencoder: With a decoder to train.
        optimizer: Makes the optimiser from the decoder's and the discriminator's weights.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        noise: sigma, the flow's.
        l2: Weight of the squared error.
        lpips: Weight of LPIPS.
        logits: Weight of the distance of ConvNeXt's logits.
        adversarial: Weight of the discriminator's judgement.
        lecam: Weight of LeCam, in the discriminator's loss.
        wavelet: Weight of the wavelets, for clips.
        perceptual: LPIPS; None is that on VGG.
        classifier: The distance of logits; None is ConvNeXt-S.
        discriminator: Pictures to logits; None is `PatchDiscriminator`.

    Raises:
        UserError: a negative number, or an autoencoder without a decoder to train.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        noise: float = 0.3,
        l2: float = 1.0,
        lpips: float = 1.0,
        logits: float = 0.1,
        adversarial: float = 0.1,
        lecam: float = 0.001,
        wavelet: float = 0.5,
        perceptual: Distance | None = None,
        classifier: Distance | None = None,
        discriminator: nn.Module | None = None,
    ):
        super().__init__()
        self.weights = {"l2": l2, "lpips": lpips, "logits": logits, "adversarial": adversarial, "wavelet": wavelet}
        for name, value in {"noise": noise, "lecam": lecam, **self.weights}.items():
            if not 0 <= value < float("inf"):
                raise UserError(f"model.{name}: found {value}, expected 0 or more")
        self.autoencoder, self.optimizer, self.scheduler = autoencoder, optimizer, scheduler
        self.noise, self.lecam = noise, lecam
        self.distances: dict[str, Distance] = {}
        if lpips:
            self.distances["lpips"] = perceptual or LPIPS()
        if logits:
            self.distances["logits"] = classifier or Logits()
        self.decoder = autoencoder.decoder().requires_grad_(True).train()
        self.discriminator = (discriminator or PatchDiscriminator()) if adversarial else None
        self.register_buffer("mean_logits", torch.zeros(2))

    def precheck(self, data: Any) -> None:
        """Called before `data` is prepared: loads the networks of the distances, or says which file is missing."""
        for distance in self.distances.values():
            distance.prepare()

    def setup(self, stage: str) -> None:
        """Refuses data that the autoencoder does not take."""
        self.precheck(self.trainer.datamodule)
        self.autoencoder.latent_shape(tuple(self.trainer.datamodule.shape))

    # ------------------------------------------------------------------ losses

    def decoded(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, Tensor]:
        """Pictures and what the decoder makes of their noisy codes, `(B, ..., C, H, W)` in [-1, 1].

        Raises:
            UserError: a batch without pictures.
        """
        x = batch.get("video", batch.get("image"))
        if x is None:
            raise UserError(f"data: batches have {', '.join(sorted(batch))}; expected image or video")
        shape = self.autoencoder.latent_shape(tuple(x.shape[1:]))
        code = self.autoencoder.encode(x, draws.normal("autoencoder", shape))
        return x, self.autoencoder.decode(code + self.noise * draws.normal("noise", shape))

    def reconstruction(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Terms of the decoder's loss that compare pictures with the originals, without their weights, each `(1,)`."""
        a, b = (part.reshape(-1, *part.shape[-3:]).float() for part in (x, y))
        found = {"l2": F.mse_loss(b * 0.5 + 0.5, a * 0.5 + 0.5)}
        for name, distance in self.distances.items():
            found[name] = distance(for_distance(b, None), for_distance(a, None)).mean()
        if x.ndim == 5 and self.weights["wavelet"]:
            found["wavelet"] = 0.5 * haar_distance(y.float(), x.float())
        return found

    def judged(self, y: Tensor) -> Tensor:
        """`-E D(y)`, whose gradient reaches y and not the discriminator."""
        fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        return -functional_call(self.discriminator, fixed, _frames(y)).mean()

    def judging(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's loss, and mean logits `(2,)` of originals and decoded pictures over all ranks."""
        real, fake = self.discriminator(_frames(x)), self.discriminator(_frames(y.detach()))
        own = torch.stack([real.mean(), fake.mean()])
        means = sum_over_ranks(own.detach()) / rank_and_world()[1]
        apart = lecam(*(own + (means - own.detach())), *self.mean_logits)
        return hinge(real, fake) + self.lecam * apart, means

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        x, y = self.decoded(batch, Draws(run_seed(), self.current_epoch, batch["index"]))
        with torch.autocast(self.device.type, enabled=False):
            terms = self.reconstruction(x, y)
            judged = self.discriminator is not None
            if judged:
                terms["adversarial"] = self.judged(y)
            loss = sum(self.weights[name] * value for name, value in terms.items())
            if judged:
                terms["discriminator"], means = self.judging(x, y)
                loss = loss + terms["discriminator"]
                self.mean_logits.lerp_(means, 0.001)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            values = {f"train/{name}": value.detach() for name, value in terms.items()}
            self.log_dict({"train/loss": loss.detach(), **values}, batch_size=len(x))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("test", batch)

    def _score(self, split: str, batch: dict[str, Any]) -> None:
        x, y = self.decoded(batch, Draws(0, 0, batch["index"]))
        terms = self.reconstruction(x, y.clamp(-1, 1))
        loss = sum(self.weights[name] * value for name, value in terms.items())
        error = (0.5 * (x - y.clamp(-1, 1))).square().flatten(1).mean(1)
        log_mean(self, f"{split}/loss", loss.expand(len(x)))
        log_mean(self, f"{split}/psnr", -10 * error.clamp(min=1e-10).log10())

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The originals, and what the decoder makes of their noisy codes."""
        x, y = self.decoded(batch, Draws(run_seed(), 0, batch["index"]))
        return {"index": batch["index"], "source": x, "video" if x.ndim == 5 else "image": y.clamp(-1, 1)}

    def configure_optimizers(self) -> Any:
        return optimizers(self)


def _frames(x: Tensor) -> Tensor:
    """Pictures or the frames of clips in [0, 1]."""
    return x.reshape(-1, *x.shape[-3:]).float() * 0.5 + 0.5
