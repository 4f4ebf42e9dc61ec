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
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from penstock.lightning_modules.checkpoints import fingerprint, load_checkpoint, load_weights
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.latent_shards import statistics
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

DECODER = ("decoder", "post_quant_conv")


class Latents(Autoencoder):
    """The autoencoder of a pipeline, whichever of `KINDS` its folder has.

    Those that work on frames take videos `(B, T, C, H, W)`, too, and give `(B, T', C', H', W')`, `T' = 1 + (T - 1) / 4`
    for those of Qwen-Image and Wan.

    Args:
        path: Folder or hub name of a pipeline with `vae/`, or of an autoencoder alone.
        chunk: Images or videos that are encoded or decoded at once.
        dtype: Of the autoencoder's weights; data come and go as float32.
        posterior: What images are encoded to where the encoder is a distribution: a sample of it, or always its mean.
        later_frames: Factor of all frames of a clip's code but the first: 0.6 for STARFlow-V (arXiv 2511.20462).
        statistics: Folder of cached latents (`penstock encode`) whose channels' means and deviations, over the training
            data, become 0 and 1; None leaves the space as the autoencoder's configuration says.
        tuned: Checkpoint of a `DecoderTuning` whose decoder takes the place of the folder's.

    Raises:
        UserError: diffusers is absent or too old; no autoencoder at `path`, or one of no known kind; statistics of
            another number of channels; the decoder of another autoencoder.
    """

    key = "latent"

    def __init__(
        self,
        path: str,
        chunk: int = 8,
        dtype: Literal["float32", "bfloat16"] = "float32",
        posterior: Literal["sample", "mean"] = "sample",
        later_frames: float = 1.0,
        statistics: str | None = None,
        tuned: str | None = None,
    ):
        subfolder, name = folders.autoencoder(path)
        if name not in KINDS:
            raise UserError(f"{path}: vae is a '{name}'{did_you_mean(name, KINDS)}, expected one of {', '.join(KINDS)}")
        if not 0 < later_frames < float("inf"):
            raise UserError(f"model.autoencoder.later_frames: found {later_frames}, expected a number above 0")
        self.kind, self.chunk, self.posterior, self.later_frames = KINDS[name], chunk, posterior, later_frames
        net = folders.part(path, subfolder, "diffusers", name, self.kind.since, low_cpu_mem_usage=False)
        net.eval().requires_grad_(False)
        self._net = net if net.dtype == getattr(torch, dtype) else net.to(getattr(torch, dtype))
        config = net.config
        self.shift, self.scale = shift_and_scale(config)
        self.channels = config[self.kind.channels]
        self.factor = spatial_factor(net)
        self.frame_factor = 2 ** sum(config["temperal_downsample"]) if self.kind.frames else 1
        self.standard = None if statistics is None else standard(statistics, self.channels)
        if tuned is not None:
            load_weights(self.decoder(), {"state_dict": tuned_weights(tuned)}, f"model.autoencoder.tuned={tuned}")

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
        code, std = self._code(image)
        return self._to_flow(code if noise is None or std is None else code + std * noise)

    @torch.no_grad()
    def law(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the flow data; no deviation where the mean is what images are encoded to."""
        code, std = self._code(image)
        if std is not None:
            std = self._later(std * _at(self.scale, image))
            std = std if self.standard is None else std / _at(self.standard[1], image)
        return self._to_flow(code), std

    def decode(self, latent: Tensor) -> Tensor:
        net = self._on(latent.device)
        frozen = not any(weight.requires_grad for weight in net.decoder.parameters())
        with torch.autocast(latent.device.type, enabled=False) if frozen else nullcontext():
            code = latent.float()
            if self.standard is not None:
                code = code * _at(self.standard[1], code) + _at(self.standard[0], code)
            code = self._later(code, -1) / _at(self.scale, latent) + _at(self.shift, latent)
            parts = [self._from_net(net.decode(self._to_net(z)).sample, latent) for z in code.split(self.chunk)]
        return torch.cat(parts)

    def identity(self) -> dict[str, Any]:
        """What codes depend on; statistics, which are made of codes, are left out."""
        shift, scale = (x.flatten().tolist() if isinstance(x, Tensor) else x for x in (self.shift, self.scale))
        encoder = {name: part for name, part in self._net.named_children() if name not in DECODER}
        found = {"class": type(self._net).__name__, "channels": self.channels, "factor": self.factor}
        found |= {"frame_factor": self.frame_factor, "shift": shift, "scale": scale, "later_frames": self.later_frames}
        return found | {"posterior": self.posterior, "weights": fingerprint(nn.ModuleDict(encoder))}

    def decoder(self) -> nn.Module:
        """The parts of the network that `decode` runs."""
        return nn.ModuleDict({name: part for name, part in self._net.named_children() if name in DECODER})

    def _later(self, code: Tensor, power: int = 1) -> Tensor:
        """All frames but the first times `later_frames^power`."""
        if code.ndim < 5 or self.later_frames == 1:
            return code
        return torch.cat([code[:, :1], code[:, 1:] * self.later_frames**power], 1)

    def _code(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the network's code."""
        net = self._on(image.device)
        with torch.autocast(image.device.type, enabled=False):
            laws = [self._law(net.encode(self._to_net(images)), images) for images in image.split(self.chunk)]
        sampled = self.posterior == "sample" and laws[0][1] is not None
        return torch.cat([mean for mean, _ in laws]), torch.cat([std for _, std in laws]) if sampled else None

    def _to_flow(self, code: Tensor) -> Tensor:
        latent = self._later((code - _at(self.shift, code)) * _at(self.scale, code))
        if self.standard is None:
            return latent
        return (latent - _at(self.standard[0], latent)) / _at(self.standard[1], latent)

    def _on(self, device: torch.device) -> nn.Module:
        if next(self._net.parameters()).device != device:
            self._net.to(device)
        return self._net

    def _law(self, found: Any, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the code; an encoder that is no distribution has none."""
        law = getattr(found, "latent_dist", None)
        if law is None:
            return self._from_net(found.latent, image), None
        return self._from_net(law.mean, image), self._from_net(law.std, image)

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


def spatial_factor(net: nn.Module) -> int:
    """Pixels of a side that become one: of Wan 2.2 the patch in front of the convolutions counts, too."""
    config = net.config
    if "dim_mult" in config:
        return 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)
    return getattr(net, "spatial_compression_ratio", 0) or 2 ** (len(config["block_out_channels"]) - 1)


def standard(folder: str, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation `(C', 1, 1)` of the channels of cached latents.

    Raises:
        UserError: no such folder, one that is not complete, or another number of channels.
    """
    mean, std = statistics(Path(folder))
    if len(mean) != channels:
        raise UserError(f"model.autoencoder.statistics: '{folder}' has {len(mean)} channels, expected {channels}")
    return mean[:, None, None], std[:, None, None]


def tuned_weights(path: str) -> dict[str, Tensor]:
    """The decoder in a checkpoint of a `DecoderTuning`, averaged where it was.

    Raises:
        UserError: the file can't be read, or holds another model.
    """
    state = load_checkpoint(path).get("state_dict", {})
    found = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")}
    if not found:
        raise UserError(f"model.autoencoder.tuned={path}: no decoder in it, expected a checkpoint of a DecoderTuning")
    return found


def _at(number: float | Tensor, like: Tensor) -> float | Tensor:
    return number.to(like.device) if isinstance(number, Tensor) else number
