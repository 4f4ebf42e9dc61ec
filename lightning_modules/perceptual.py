"""Distances of images in the features of trained networks, for losses; weights come from torchvision's files.

LPIPS (arXiv 1801.03924) by torchmetrics' network, and the distance of ConvNeXt's logits.
"""

import pickle
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import convnext_small

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.premetrics import Distance

FILES = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
CONVNEXT = "convnext_small-0c510722.pth"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
URL = "https://download.pytorch.org/models/"


class LPIPS(Distance):
    """Weighted squared differences of normalised features, mean over space, sum over layers.

    The linear heads come with torchmetrics, the backbone's weights from torchvision's file. No submodule of anything:
    it stays out of checkpoints, averages and DDP, follows the device of its input, and computes in float32 (float64
    for float64 images) whatever the precision of the run.

    Args:
        net: backbone; `vgg` (VGG16) trains 2-rectified flow++, `squeeze` is 60 times as cheap.
        weights: state dict of torchvision's classifier (safetensors or .pth, any float type); None is torchvision's own
            file in PyTorch's hub folder, downloaded there if it is missing.
        average_pooling: 2x2 means in place of VGG's maxima, as in 2-rectified flow++. `vgg` only.

    Raises:
        UserError: average pooling in another network.
    """

    def __init__(
        self,
        net: Literal["vgg", "alex", "squeeze"] = "vgg",
        weights: str | None = None,
        average_pooling: bool = False,
    ):
        if average_pooling and net != "vgg":
            raise UserError(f"LPIPS: average_pooling is true with net {net}, expected vgg (or average_pooling=false)")
        self.net, self.weights, self.average_pooling = net, weights, average_pooling
        self._net: nn.Module | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None

    def prepare(self) -> None:
        """Loads the network once.

        Raises:
            UserError: the file is missing and cannot be downloaded, cannot be read, or holds other weights.
        """
        if self._net is None:
            self._net = self._load()

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """`(B,)` of RGB images `(B, 3, H, W)` in [0, 1], at least 32 pixels a side."""
        self.prepare()
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        if self._place != (images.device, dtype):
            self._net.to(images.device, dtype)
            self._place = images.device, dtype
        with torch.autocast(images.device.type, enabled=False):
            return self._net(images.to(dtype), references.detach().to(dtype), normalize=True).flatten()

    def _load(self) -> nn.Module:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        path = weights_file("LPIPS", FILES[self.net], self.weights)
        net = _NoTrainLpips(net=self.net, pnet_rand=True).requires_grad_(False).eval()
        state = read_weights("LPIPS", path, self.net)
        own = {name: _official(name) for name in net.net.state_dict()}
        missing = [key for key in own.values() if key not in state]
        if missing:
            raise UserError(f"LPIPS: {path} lacks {missing[0]}, expected the state dict of torchvision's {self.net}")
        try:
            net.net.load_state_dict({name: state[key].float() for name, key in own.items()})
        except RuntimeError as error:
            raise UserError(
                f"LPIPS: {path} does not fit torchvision's {self.net}: {str(error).splitlines()[-1].strip()}"
            ) from error
        if self.average_pooling:
            for part in net.net.children():
                for name, layer in part.named_children():
                    if isinstance(layer, nn.MaxPool2d):
                        part.register_module(name, nn.AvgPool2d(2, 2))
        return net


class Logits(Distance):
    """Mean square of the difference between the logits of torchvision's ConvNeXt-S (arXiv 2201.03545), at 224 pixels.

    Images are brought to 224x224 with antialiasing and normalised as ImageNet is. As `LPIPS`, it is no submodule of
    anything and computes in float32.

    Args:
        weights: state dict of torchvision's ConvNeXt-S (safetensors or .pth, any float type); None is torchvision's own
            file in PyTorch's hub folder, downloaded there if it is missing.
    """

    def __init__(self, weights: str | None = None):
        self.weights = weights
        self._net: nn.Module | None = None
        self._device: torch.device | None = None

    def prepare(self) -> None:
        """Loads the network once.

        Raises:
            UserError: the file is missing and cannot be downloaded, cannot be read, or holds other weights.
        """
        if self._net is None:
            path = weights_file("Logits", CONVNEXT, self.weights)
            net = convnext_small().requires_grad_(False).eval()
            state = read_weights("Logits", path, "ConvNeXt-S")
            try:
                net.load_state_dict({key: value.float() for key, value in state.items()})
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise UserError(f"Logits: {path} does not fit torchvision's ConvNeXt-S: {reason}") from error
            self._net = net

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """`(B,)` of RGB images `(B, 3, H, W)` in [0, 1]."""
        self.prepare()
        if self._device != images.device:
            self._net.to(images.device)
            self._device = images.device
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                target = self._net(_at_224(references.detach()))
            return (self._net(_at_224(images)) - target).square().mean(1)


def _at_224(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in IMAGENET)
    return (F.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True) - mean) / std


def weights_file(what: str, name: str, weights: str | None) -> Path:
    """The file `weights`, or torchvision's `name` in PyTorch's hub folder, downloaded if it is missing.

    Raises:
        UserError: there is none and it cannot be had.
    """
    path = Path(weights or Path(torch.hub.get_dir(), "checkpoints", name)).expanduser()
    if weights is None and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            digest = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(URL + name, str(path), hash_prefix=digest, progress=False)
        except Exception as error:
            raise UserError(
                f"{what}: {name} is missing and cannot be downloaded ({type(error).__name__}); "
                f"get {URL}{name} and put it at {path}, or give its path as `weights`"
            ) from error
    if not path.is_file():
        raise UserError(f"{what}: no weights file {path}; expected torchvision's {name} from {URL}{name}")
    return path


def _official(name: str) -> str:
    """`slice2.5.weight` and `slices.1.3.squeeze.weight` in torchmetrics are `features.5...` and `features.3...`."""
    parts = name.split(".")
    return ".".join(["features", *parts[2 if parts[0] == "slices" else 1 :]])


def read_weights(what: str, path: Path, net: str) -> dict[str, Tensor]:
    """The state dict in a file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{what}: {path} cannot be read as weights ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{what}: {path} is no state dict of tensors, expected that of torchvision's {net}")
    return state
