"""Named features of samples, on which distances between sets are measured. timm is imported where it is used.

A metric carries the name of its features: `fd_pixels`, `fd_mobilenetv2`. Only the Inception-V3 network of
torch-fidelity with its published weights earns the plain names `fid` and `kid`.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.timm_weights import load_weights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class FeatureExtractor(ABC):
    """Maps samples `(b, *shape)` to features `(b, D)`, float32; `(b k, D)` for features of k parts of each (frames).

    Attributes:
        name: what the metrics are called after.
    """

    name: str

    def metric(self, kind: Literal["fd", "kid", "precision", "recall"]) -> str:
        """The honest name of a metric on these features: `fd` on `pixels` is `fd_pixels`."""
        return f"{kind}_{self.name}"

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Loads what is needed, once, and moves it to `device`. Raises `UserError` when a file is missing or wrong."""

    @abstractmethod
    def __call__(self, data: Tensor) -> Tensor:
        """`(b, D)` float32 features of samples on the device given to `prepare`; images and videos in [-1, 1].

        Features of parts of the samples are `(b k, D)`, those of a sample one after the other.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that determines the features (preprocessing, hash of the weights): part of a cache's key."""


class Pixels(FeatureExtractor):
    """The values of an image or a video in [-1, 1], flattened."""

    name = "pixels"

    def prepare(self, device: torch.device) -> None:
        """Nothing to load."""

    def __call__(self, data: Tensor) -> Tensor:
        """Flattens."""
        if data.ndim < 4:
            raise UserError(f"features Pixels: samples of shape {tuple(data.shape[1:])} are no images; use Points")
        return data.flatten(1).float()

    def identity(self) -> dict[str, Any]:
        """Only the name."""
        return {"name": self.name}


class Points(FeatureExtractor):
    """The coordinates of points `(b, D)`."""

    name = "points"

    def prepare(self, device: torch.device) -> None:
        """Nothing to load."""

    def __call__(self, data: Tensor) -> Tensor:
        """The points."""
        if data.ndim != 2:
            raise UserError(f"features Points: samples of shape {tuple(data.shape[1:])} are no points; use Pixels")
        return data.float()

    def identity(self) -> dict[str, Any]:
        """Only the name."""
        return {"name": self.name}


class NetworkFeatures(FeatureExtractor):
    """Features of a frozen network, loaded at first use."""

    def __init__(self) -> None:
        self._net: nn.Module | None = None
        self._hash = ""

    @abstractmethod
    def _load(self) -> nn.Module: ...

    def prepare(self, device: torch.device) -> None:
        """Loads the network, hashes its weights and moves it to `device`."""
        if self._net is None:
            self._net = self._load().eval().requires_grad_(False)
            self._hash = hash_state(self._net)
        self._net.to(device)


class TimmFeatures(NetworkFeatures):
    """The pooled features (before the classifier) of any timm model.

    Images are made RGB, resized to the model's input size (bicubic, antialiased) and normalised with its mean and
    standard deviation.
    """

    def __init__(
        self,
        model: str,
        name: str,
        weights: str | None = None,
        pad_type: Literal["same"] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        """Names the model; nothing is loaded yet.

        Args:
            model: timm model name, or `hf-hub:<owner>/<name>`.
            name: lower-case word that the metrics are called after (`mobilenetv2` gives `fd_mobilenetv2`).
            weights: a safetensors or PyTorch file of the model's state dict, half precision allowed; None = timm's own
                pretrained weights, downloaded at first use.
            pad_type: `same` for models with TensorFlow's padding; None = the model's default.
            mean: of RGB values in [0, 1]; None = the model's data configuration.
            std: likewise.

        Raises:
            UserError: for an unknown model or a name that is not one lower-case word or means other features.
        """
        import timm

        super().__init__()
        if not re.fullmatch(r"[a-z0-9_]+", name) or name in {"pixels", "points", "inception"}:
            raise UserError(
                f"features name: '{name}' given, expected letters a-z, digits and _, "
                "and not pixels, points or inception"
            )
        if not model.startswith("hf-hub:") and not timm.is_model(model):
            raise UserError(f"features model: timm has no '{model}'{did_you_mean(model, timm.list_models())}")
        self.name, self.model, self.weights = name, model, weights
        self.pad_type, self.mean, self.std = pad_type, mean, std

    def _load(self) -> nn.Module:
        import timm

        padding = {} if self.pad_type is None else {"pad_type": self.pad_type}
        if self.weights is None:
            try:
                net = timm.create_model(self.model, pretrained=True, **padding)
            except Exception as error:
                raise UserError(
                    f"features '{self.name}': the weights of timm's {self.model} cannot be downloaded "
                    f"({type(error).__name__}); put the file anywhere and give its path as `weights`"
                ) from error
        else:
            net = timm.create_model(self.model, pretrained=False, **padding)
            load_weights(net, self.weights, f"features '{self.name}'", f"timm's {self.model}")
        config = timm.data.resolve_data_config({}, model=net)
        self._size = tuple(config["input_size"][1:])
        self._mean = tuple(self.mean or config["mean"])
        self._std = tuple(self.std or config["std"])
        net.reset_classifier(0)
        return net

    @torch.no_grad()
    def __call__(self, data: Tensor) -> Tensor:
        """`(b, D)` of images `(b, 1 or 3, H, W)`."""
        images = interpolate(rgb(data) / 2 + 0.5, self._size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (images.new_tensor(value).view(1, 3, 1, 1) for value in (self._mean, self._std))
        return self._net((images.clamp(0, 1) - mean) / std).float()

    def identity(self) -> dict[str, Any]:
        """Model, weights and preprocessing; after `prepare`."""
        return {
            "name": self.name,
            "model": self.model,
            "weights": self._hash,
            "pad_type": self.pad_type,
            "resize": ["bicubic", "antialias", *self._size],
            "mean": list(self._mean),
            "std": list(self._std),
        }


class Inception(NetworkFeatures):
    """The 2,048 features of the Inception-V3 that defines FID (arXiv 1706.08500), as torch-fidelity computes them.

    Images are rounded to 8 bits, as files would be.
    """

    name = "inception"

    def __init__(self, weights: str | None = None):
        """Names the weights; nothing is loaded yet.

        Args:
            weights: torch-fidelity's file `weights-inception-2015-12-05-6726825d.pth`; None = the copy in PyTorch's hub
                folder, downloaded at first use.
        """
        super().__init__()
        self.weights = weights

    def metric(self, kind: Literal["fd", "kid", "precision", "recall"]) -> str:
        """`fid`, `kid`, `precision_inception`, `recall_inception`."""
        return {"fd": "fid", "kid": "kid"}.get(kind) or super().metric(kind)

    def _load(self) -> nn.Module:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(self._file()))

    def _file(self) -> Path:
        path = Path(self.weights or Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)).expanduser()
        if not path.is_file() and self.weights is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
            except Exception as error:
                raise UserError(
                    f"fid: {INCEPTION_FILE} is missing and cannot be downloaded ({type(error).__name__}); "
                    f"get {INCEPTION_URL} and put it at {path}, or give its path as `weights`"
                ) from error
        if not path.is_file():
            raise UserError(f"fid: no file {path}; expected {INCEPTION_FILE} from {INCEPTION_URL}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != INCEPTION_SHA256:
            raise UserError(
                f"fid: {path} is not torch-fidelity's Inception (sha256 {digest[:8]}..., expected "
                f"{INCEPTION_SHA256[:8]}...); values of other weights must not be called fid"
            )
        return path

    @torch.no_grad()
    def __call__(self, data: Tensor) -> Tensor:
        """`(b, 2048)` of images `(b, 1 or 3, H, W)`."""
        images = ((rgb(data) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self._net(images)[0].float()

    def identity(self) -> dict[str, Any]:
        """Weights and rounding; after `prepare`."""
        return {"name": self.name, "weights": self._hash, "input": "uint8"}


def hash_state(net: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of a network's state."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def row_numbers(index: Tensor, features: Tensor) -> Tensor:
    """Numbers of rows `(b k, D)` of features: those of the samples `index` `(b,)`, or `k index + 0 .. k-1`."""
    each = len(features) // max(1, len(index))
    return (each * index[:, None] + torch.arange(each, device=index.device)).flatten()


def rgb(images: Tensor) -> Tensor:
    """Images `(b, 1 or 3, H, W)` with three channels, float32.

    Raises:
        UserError: samples of another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"features: samples of shape {tuple(images.shape[1:])}, expected images of 1 or 3 channels")
    return images.float().expand(-1, 3, -1, -1)
