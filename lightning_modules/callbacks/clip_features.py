"""Named features of clips `(B, T, C, H, W)`, for distances between sets of videos.

`fvd` is only the I3D network of the original (arXiv 1812.01717); on another network its name follows, `fvd_r3d_18`.
Pixels, and frames taken as images, give `fd_clip_pixels` and `fd_frames_<features>`.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d, interpolate

from penstock.lightning_modules.callbacks.features import FeatureExtractor, NetworkFeatures, load_weights, rgb
from penstock.lightning_modules.errors import UserError, did_you_mean

VideoModel = Literal[
    "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"
]
Kind = Literal["fd", "kid", "precision", "recall"]
CELLS, MOMENTS = 4, 8
I3D_FILE = "i3d_torchscript.pt"
I3D_SOURCE = "https://github.com/universome/fvd-comparison"
I3D_FRAMES = 10


class Frames(FeatureExtractor):
    """Features of every frame as an image: T rows a clip, `frames_<features>`.

    Args:
        features: of images.
    """

    def __init__(self, features: FeatureExtractor):
        self.features = features
        self.name = f"frames_{features.name}"

    def prepare(self, device: torch.device) -> None:
        self.features.prepare(device)

    def __call__(self, data: Tensor) -> Tensor:
        """`(b T, D)`, the frames of a clip one after the other."""
        return self.features(clips(data).flatten(0, 1))

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "frames": self.features.identity()}


class ClipPixels(FeatureExtractor):
    """A fixed linear map of the pixels of a clip, `clip_pixels`: how it looks, and how it moves; no weights.

    Means over a grid of 4x4 cells of (1) the frames, averaged over 8 equal parts of the clip, and (2) the differences
    of neighbouring frames, at 8 places spread evenly from the first to the last: `2 * 8 * 16 C` numbers, fewer for
    clips of less than 9 frames. A Gaussian of these knows how every place goes on in time, in both parts; the second
    one has what happens between two frames, jumps and flicker, which the first averages away.
    """

    name = "clip_pixels"

    def prepare(self, device: torch.device) -> None:
        """Nothing to load."""

    def __call__(self, data: Tensor) -> Tensor:
        """`(b, D)` of clips of two frames or more."""
        x = clips(data, least=2).float()
        last = x.shape[1] - 1
        places = torch.linspace(0, last - 1, min(MOMENTS, last), dtype=torch.float64).round().long()
        looks, moves = x, x[:, places + 1] - x[:, places]
        return torch.cat([_cells(looks, min(MOMENTS, last + 1)), _cells(moves, len(places))], 1)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "cells": CELLS, "moments": MOMENTS}


class VideoNetwork(NetworkFeatures):
    """The pooled features (before the classifier) of a video network of torchvision, trained on Kinetics-400.

    Clips are made RGB, brought to `frames` frames (evenly spaced, the nearest ones), resized to the network's input
    (bilinear, antialiased, nothing cut off) and normalised with its mean and standard deviation. The metrics are
    `fvd_<model>`, `kvd_<model>`.
    """

    def __init__(self, model: VideoModel = "r3d_18", weights: str | None = None, frames: int = 16):
        """Names the network; nothing is loaded yet.

        Args:
            model: of torchvision.
            weights: file of its state dict (.pth or safetensors); None = the copy in PyTorch's hub folder, downloaded
                at first use.
            frames: that the network sees; torchvision's were trained on 16.

        Raises:
            UserError: for an unknown model, or fewer than 14 frames.
        """
        super().__init__()
        if model not in get_args(VideoModel):
            raise UserError(f"features model: no video network '{model}'{did_you_mean(model, get_args(VideoModel))}")
        if frames < 14 or (model.startswith("mvit") and frames != 16):
            raise UserError(
                f"features frames: {frames} given, expected 16 (or another number from 14 on, not for mvit)"
            )
        self.model, self.weights, self.frames, self.name = model, weights, frames, model

    def metric(self, kind: Kind) -> str:
        """`fvd_r3d_18`, `kvd_r3d_18`, `precision_r3d_18`, `recall_r3d_18`."""
        return {"fd": "fvd_", "kid": "kvd_"}.get(kind, f"{kind}_") + self.name

    def _load(self) -> nn.Module:
        from torchvision.models import get_model, get_model_weights

        known = get_model_weights(self.model).DEFAULT
        self._preset = known.transforms()
        net = get_model(self.model, weights=None)
        load_weights(net, str(self._file(known.url)), f"features '{self.name}'", f"torchvision's {self.model}")
        for head in ("fc", "classifier", "head"):
            if hasattr(net, head):
                setattr(net, head, nn.Identity())
        return net

    def _file(self, url: str) -> Path:
        if self.weights is not None:
            return Path(self.weights).expanduser()
        path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = path.stem.rsplit("-", 1)[1]
            try:
                torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
            except Exception as error:
                raise UserError(
                    f"features '{self.name}': {path.name} is missing and cannot be downloaded "
                    f"({type(error).__name__}); get {url} and put it at {path}, or give its path as `weights`"
                ) from error
        return path

    @torch.no_grad()
    def __call__(self, data: Tensor) -> Tensor:
        """`(b, D)` of clips of any length."""
        places = torch.linspace(0, data.shape[1] - 1, self.frames, dtype=torch.float64).round().long()
        images = rgb(clips(data).flatten(0, 1)).unflatten(0, data.shape[:2])[:, places].flatten(0, 1)
        size = list(self._preset.crop_size)
        images = interpolate(images / 2 + 0.5, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (self._preset.mean, self._preset.std))
        video = ((images.clamp(0, 1) - mean) / std).unflatten(0, (len(data), self.frames)).transpose(1, 2)
        return self._net(video).flatten(1).float()

    def identity(self) -> dict[str, Any]:
        """Network, weights and preprocessing; after `prepare`."""
        preset = [list(self._preset.crop_size), list(self._preset.mean), list(self._preset.std)]
        return {"name": self.name, "weights": self._hash, "frames": self.frames, "bilinear, antialias": preset}


class I3D(NetworkFeatures):
    """The 400 features (logits) of the I3D network that defines FVD (arXiv 1812.01717): `fvd`, `kvd`.

    It is the TorchScript copy that is in general use, `i3d_torchscript.pt`, which resizes by itself; a TorchScript file
    holds code, so take it from where you trust it. Frames are rounded to 8 bits.
    """

    name = "i3d"

    def __init__(self, weights: str = I3D_FILE):
        """Names the file; nothing is loaded yet.

        Args:
            weights: path of `i3d_torchscript.pt`.
        """
        super().__init__()
        self.weights = weights

    def metric(self, kind: Kind) -> str:
        """`fvd`, `kvd`, `precision_i3d`, `recall_i3d`."""
        return {"fd": "fvd", "kid": "kvd"}.get(kind) or super().metric(kind)

    def _load(self) -> nn.Module:
        path = Path(self.weights).expanduser()
        if not path.is_file():
            raise UserError(
                f"fvd: no file {path}; expected {I3D_FILE} (linked from {I3D_SOURCE}); put it there or give its path "
                "as `weights`, or take other features (ClipPixels needs no file)"
            )
        try:
            return nn.ModuleList([torch.jit.load(str(path), map_location="cpu")])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"fvd: {path} cannot be read as TorchScript; expected {I3D_FILE}") from error

    @torch.no_grad()
    def __call__(self, data: Tensor) -> Tensor:
        """`(b, 400)` of clips of 10 frames or more."""
        images = rgb(clips(data, least=I3D_FRAMES).flatten(0, 1))
        images = ((images + 1) * 127.5).round().clamp(0, 255).unflatten(0, data.shape[:2])
        features = self._net[0](images.transpose(1, 2).contiguous(), rescale=True, resize=True, return_features=True)
        if features.shape != (len(data), 400):
            raise UserError(
                f"fvd: {self.weights} gives {tuple(features.shape)}, expected ({len(data)}, 400) of {I3D_FILE}"
            )
        return features.float()

    def identity(self) -> dict[str, Any]:
        """Weights and rounding; after `prepare`."""
        return {"name": self.name, "weights": self._hash, "input": "uint8"}


def clips(data: Tensor, least: int = 1) -> Tensor:
    """The data, if they are clips of at least `least` frames.

    Raises:
        UserError: samples of another shape.
    """
    if data.ndim != 5 or data.shape[1] < least:
        frames = f" of {least} frames or more" if least > 1 else ""
        raise UserError(f"features: samples of shape {tuple(data.shape[1:])}, expected videos{frames}")
    return data


def _cells(x: Tensor, moments: int) -> Tensor:
    return adaptive_avg_pool3d(x.transpose(1, 2), (moments, CELLS, CELLS)).flatten(1)
