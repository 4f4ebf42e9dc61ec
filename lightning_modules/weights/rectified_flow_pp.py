"""Official checkpoints of 2-rectified flow++ (arXiv 2405.20320, `sangyun884/rfpp`), and EDM's that it starts from.

A weights file is a plain state dict of the EDM-preconditioned network, averaged, every key under `model.`: our
`EDMVelocity` has the same names. `training_state_<n>.pth` holds `model_state_dict` (raw) and, in
`optimizer_state_dict`, the average of each trainable parameter in the order of the names.

    net = pretrained("flow_model_800000_ema.pth")               # also a class_path for a net in YAML
    flow.net.load_state_dict(load("flow_model_800000_ema.pth"))  # into a module that holds a fitting net
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.edm import EDMVelocity, dhariwal_imagenet64, song_unet_64, song_unet_cifar10
from penstock.lightning_modules.weights import official

PRESETS: dict[str, Callable[..., EDMVelocity]] = {
    "song_unet_cifar10": song_unet_cifar10,
    "song_unet_64": song_unet_64,
    "dhariwal_imagenet64": dhariwal_imagenet64,
}
BUFFERS = ("resample_filter", "freqs")


def load(path: str | Path, which: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
    """The state dict of an `EDMVelocity`, float32, from an official file.

    Args:
        path: `.pth` of weights or of a training state. Only tensors and plain containers are read, no code is run.
        which: averaged or raw weights of a training state; a file of weights has one set only.

    Raises:
        UserError: the file is absent, cut short, holds other objects, or has another layout.
    """
    path = Path(path)
    content = _read(path)
    state = content.get("model_state_dict", content)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: found {_keys(content)}; expected a state dict of tensors, or a training state")
    state = {key.removeprefix("module.").replace("_orig_mod.", ""): value for key, value in state.items()}
    foreign = next((key for key in state if not key.startswith("model.")), None)
    if foreign:
        raise UserError(f"{path}: found the key '{foreign}'; expected all keys under 'model.' (an EDM network)")
    if which == "ema" and "model_state_dict" in content:
        state |= _averages(path, content, state)
    return {key: value.float() for key, value in state.items()}


def detect(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Name of the preset in `PRESETS` that has the keys and shapes of `state`, and its number of classes.

    Raises:
        UserError: none fits; the message names the first difference from the nearest preset.
    """
    labels = state.get("model.map_label.weight")
    classes = 0 if labels is None else labels.shape[1]
    return official.preset(state, {k: partial(build, num_classes=classes) for k, build in PRESETS.items()}), classes


def pretrained(path: str, which: Literal["ema", "raw"] = "ema", dropout: float = 0.0) -> EDMVelocity:
    """An EDM network as a velocity field, with the weights of an official file; the preset is found from the shapes.

    Args:
        path: official file: a trained 2-rectified flow++, or EDM's network, which is a first rectified flow.
        which: averaged or raw weights of a training state.
        dropout: for further training.

    Raises:
        UserError: see `load` and `detect`.
    """
    state = load(path, which)
    try:
        name, classes = detect(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    net = PRESETS[name](dropout=dropout, num_classes=classes)
    net.load_state_dict(state)
    return net


def load_into(net: nn.Module, path: str | Path, which: Literal["ema", "raw"] = "ema") -> None:
    """Loads an official file into `net`, an EDMVelocity of any size.

    Raises:
        UserError: see `load`; or the network has other keys or shapes than the file.
    """
    official.fill(net, load(path, which), path)


def _read(path: Path) -> dict[str, Any]:
    content = official.read(path, "official weights of 2-rectified flow++ or EDM (.pth)")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: found {type(content).__name__}; expected a state dict or a training state")
    return content


def _averages(path: Path, content: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [key for key in state if not key.endswith(BUFFERS)]
    kept = content.get("optimizer_state_dict", {})
    kept = kept.get("state", {}) if isinstance(kept, dict) else {}
    averages = [kept.get(i, {}).get("ema") for i in range(len(names))]
    for name, value in zip(names, averages):
        if not isinstance(value, Tensor) or value.shape != state[name].shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else "none"
            raise UserError(f"{path}: average of {name}: found {found}, expected {tuple(state[name].shape)}")
    return dict(zip(names, averages))


def _keys(content: Mapping[str, Any]) -> str:
    return ", ".join(sorted(content)[:6]) or "nothing"
