"""Autoencoders of diffusers as the space that a flow lives in, by folder or hub name of a pipeline.

The flow's data are `(z - shift) scale` of the code z that the autoencoder knows, as in diffusers' own pipelines:

| autoencoder | of | shift | scale |
|---|---|---|---|
| `AutoencoderKL` | Stable Diffusion 1 to 3.5, Z-Image | `shift_factor`, if any | `scaling_factor` |
| `AutoencoderDC` | SANA | | `scaling_factor` |
| `AutoencoderKLQwenImage`, `AutoencoderKLWan` | Qwen-Image, Wan | `latents_mean` | 1 / `latents_std` |

diffusers (the extra `text2image`) is imported where it is used.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.weights import folders


class Kind(NamedTuple):
    """What autoencoders of diffusers differ in.

    Attributes:
        since: Version of diffusers that has it.
        channels: Entry of its configuration with the number of the code's channels.
        frames: Whether it works on videos `(B, C, T, H, W)`, an image being one of one frame.
    """

    since: str
    channels: str
    frames: bool = False


KINDS = {
    "AutoencoderKL": Kind("0.32", "latent_channels"),
    "AutoencoderDC": Kind("0.32", "latent_channels"),
    "AutoencoderKLQwenImage": Kind("0.35", "z_dim", frames=True),
    "AutoencoderKLWan": Kind("0.35", "z_dim", frames=True),
}


class Latents(Autoencoder):
    """The autoencoder of a pipeline, whichever of `KINDS` its folder has.

    Those that work on frames take videos `(B, T, C, H, W)`, too, and give `(B, T', C', H', W')`, `T' = 1 + (T - 1) / 4`
    for those of Qwen-Image and Wan.

    Args:
        path: Folder or hub name with `vae/`.
        chunk: Images or videos that are encoded or decoded at once.
        dtype: Of the autoencoder's weights; data come and go as float32.
        posterior: What images are encoded to where the encoder is a distribution: a sample of it, or always its mean.

    Raises:
        UserError: diffusers is absent or too old; no autoencoder at `path`, or one of no known kind.
    """

    key = "latent"

    def __init__(
        self,
        path: str,
        chunk: int = 8,
        dtype: Literal["float32", "bfloat16"] = "float32",
        posterior: Literal["sample", "mean"] = "sample",
    ):
        name = folders.class_name(path, "vae")
        if name not in KINDS:
            raise UserError(f"{path}: vae is a '{name}'{did_you_mean(name, KINDS)}, expected one of {', '.join(KINDS)}")
        self.kind, self.chunk, self.posterior = KINDS[name], chunk, posterior
        net = folders.part(path, "vae", "diffusers", name, self.kind.since, low_cpu_mem_usage=False)
        net.eval().requires_grad_(False)
        self._net = net if net.dtype == getattr(torch, dtype) else net.to(getattr(torch, dtype))
        config = net.config
        self.shift, self.scale = shift_and_scale(config)
        self.channels = config[self.kind.channels]
        self.factor = getattr(net, "spatial_compression_ratio", 0) or 2 ** (len(config.get("block_out_channels")) - 1)
        self.frame_factor = 2 ** sum(config["temperal_downsample"]) if self.kind.frames else 1

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(C', H / 8, W / 8)` of `(C, H, W)` for a factor of 8, `(T', C', H / 8, W / 8)` of `(T, C, H, W)`.

        Raises:
            UserError: another number of channels, sides that the factor does not divide, or a number of frames that is
                not one more than a multiple of the factor of time.
        """
        *frames, channels, height, width = shape
        if channels != 3 or height % self.factor or width % self.factor:
            found = f"{channels} channels and {height}x{width} pixels"
            raise UserError(f"model.autoencoder: images of {found}, expected 3 and multiples of {self.factor}")
        if frames and (not self.kind.frames or (frames[0] - 1) % self.frame_factor):
            expected = f"1 more than a multiple of {self.frame_factor}" if self.kind.frames else "images"
            raise UserError(f"model.autoencoder: videos of {frames[0]} frames, expected {expected}")
        times = [1 + (number - 1) // self.frame_factor for number in frames]
        return *times, self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        net = self._on(image.device)
        with torch.autocast(image.device.type, enabled=False):
            laws = [self._law(net.encode(self._to_net(images)), images) for images in image.split(self.chunk)]
        code = torch.cat([mean for mean, _ in laws])
        if noise is not None and self.posterior == "sample":
            code = code + torch.cat([std for _, std in laws]) * noise
        return (code - _at(self.shift, image)) * _at(self.scale, image)

    def decode(self, latent: Tensor) -> Tensor:
        net = self._on(latent.device)
        with torch.autocast(latent.device.type, enabled=False):
            code = latent.float() / _at(self.scale, latent) + _at(self.shift, latent)
            parts = [self._from_net(net.decode(self._to_net(z)).sample, latent) for z in code.split(self.chunk)]
        return torch.cat(parts)

    def _on(self, device: torch.device) -> nn.Module:
        if next(self._net.parameters()).device != device:
            self._net.to(device)
        return self._net

    def _law(self, found: Any, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the code; an encoder that is no distribution has none."""
        law = getattr(found, "latent_dist", None)
        mean = self._from_net(found.latent if law is None else law.mean, image)
        return mean, torch.zeros_like(mean) if law is None else self._from_net(law.std, image)

    def _to_net(self, x: Tensor) -> Tensor:
        x = x.to(self._net.dtype)
        if x.ndim == 5:
            return x.transpose(1, 2)
        return x[:, :, None] if self.kind.frames else x

    def _from_net(self, x: Tensor, like: Tensor) -> Tensor:
        x = x.float()
        if like.ndim == 5:
            return x.transpose(1, 2)
        return x[:, :, 0] if self.kind.frames else x


def shift_and_scale(config: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
    """Shift and scale of the code, numbers or `(C', 1, 1)`, from an autoencoder's configuration."""
    factor = float(config.get("scaling_factor") or 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return float(config.get("shift_factor") or 0.0), factor
    return torch.tensor(mean).reshape(-1, 1, 1), factor / torch.tensor(std).reshape(-1, 1, 1)


def _at(number: float | Tensor, like: Tensor) -> float | Tensor:
    return number.to(like.device) if isinstance(number, Tensor) else number
