"""Official checkpoints of Rectified Flow (arXiv 2209.03003, `gnobitab/RectifiedFlow`) for our NCSN++.

An official file is a dict `optimizer`, `model`, `ema`, `step`. `model` is the state dict of a DataParallel network
(prefix `module.`; layers `all_modules.<index>.<name>`, buffer `sigmas`). `ema["shadow_params"]` is a list without names
that follows the trainable parameters of `model`; the frozen Fourier frequencies exist in `model` only.

    net = pretrained("checkpoint_8.pth")                        # also a class_path for a net in YAML
    flow.net.load_state_dict(load("checkpoint_8.pth"))          # into a module that holds a fitting net
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.ncsnpp import NCSNpp, ddpmpp_cifar10, ncsnpp_256
from penstock.lightning_modules.weights import official

PRESETS: dict[str, Callable[..., NCSNpp]] = {"ddpmpp_cifar10": ddpmpp_cifar10, "ncsnpp_256": ncsnpp_256}
FROZEN = "all_modules.0.W"
BLOCK = {"GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "time", "GroupNorm_1": "norm1", "Conv_1": "conv1"}
BLOCK |= {"Conv_2": "shortcut"}
ATTENTION = {"GroupNorm_0": "norm", "NIN_0": "query", "NIN_1": "key", "NIN_2": "value", "NIN_3": "out"}
COMBINE = {"Conv_0": "conv"}
LEAVES = {"W": "weight", "b": "bias"}
CLOCK = ("fourier", "first", "second")
BACK = {ours: theirs for table in (BLOCK, ATTENTION, COMBINE) for theirs, ours in table.items()}


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our NCSNpp state dict from an official one, with or without the prefix `module.`; `sigmas` is left out.

    Raises:
        UserError: a key is not of the official layout.
    """
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    plain.pop("sigmas", None)
    parts = {key: _split(key, "all_modules") for key in plain}
    inner = {}
    for index, layer, _ in parts.values():
        inner.setdefault(index, set()).add(layer)
    clock = CLOCK if FROZEN in plain else CLOCK[1:]
    out = {}
    for key, (index, layer, leaf) in parts.items():
        table = ATTENTION if "NIN_0" in inner[index] else BLOCK if "Dense_0" in inner[index] else COMBINE
        leaf = LEAVES.get(leaf, leaf)
        if (layer and layer not in table) or leaf not in ("weight", "bias"):
            raise UserError(f"unexpected entry '{key}' in a layer with {', '.join(sorted(inner[index]))}")
        place = f"time.{clock[index]}" if index < len(clock) else f"layers.{index - len(clock)}"
        ours = ".".join(filter(None, (place, table.get(layer, ""), leaf)))
        out[ours] = plain[key].T.contiguous() if layer.startswith("NIN_") and leaf == "weight" else plain[key]
    return out


def invert(state: Mapping[str, Tensor], num_scales: int = 1000, sigma_max: float = 50.0) -> dict[str, Tensor]:
    """The official state dict (no prefix) from ours: the inverse of `convert`.

    Args:
        state: state dict of an unconditional NCSNpp.
        num_scales: length of `sigmas`: 1000 for CIFAR-10, 2000 at 256 px.
        sigma_max: first of `sigmas`, geometric down to 0.01: 50 for CIFAR-10, 378 at 256 px.

    Raises:
        UserError: a key is not one of an unconditional NCSNpp.
    """
    sigmas = torch.linspace(math.log(sigma_max), math.log(0.01), num_scales, dtype=torch.float64).exp()
    out = {"sigmas": sigmas}
    clock = CLOCK if "time.fourier.weight" in state else CLOCK[1:]
    for key, value in state.items():
        own = re.fullmatch(rf"time\.({'|'.join(clock)})\.(weight|bias)", key)
        if own is not None:
            out[f"all_modules.{clock.index(own[1])}.{'W' if own[1] == 'fourier' else own[2]}"] = value
            continue
        index, layer, leaf = _split(key, "layers")
        if (layer and layer not in BACK) or leaf not in ("weight", "bias"):
            raise UserError(f"unexpected entry '{key}' in the state dict of an NCSNpp")
        index, theirs = index + len(clock), BACK.get(layer, "")
        if theirs.startswith("NIN_"):
            leaf = {"weight": "W", "bias": "b"}[leaf]
        key = ".".join(filter(None, ("all_modules", str(index), theirs, leaf)))
        out[key] = value.T.contiguous() if theirs.startswith("NIN_") and leaf == "W" else value
    return out


def load(path: str | Path, which: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
    """Our NCSNpp state dict from an official checkpoint file.

    Args:
        path: file `checkpoint_<k>.pth`. Only tensors and plain containers are read, no code is run.
        which: averaged weights (for sampling and for making pairs), or the raw ones (from which reflow starts).

    Raises:
        UserError: the file is absent, cut short, holds other objects, or has another layout.
    """
    content = _read(Path(path))
    model = content["model"]
    if which == "raw":
        return _named(path, convert, model)
    trainable = (key for key in model if key.removeprefix("module.") not in ("sigmas", FROZEN))
    names = _named(path, lambda keys: sorted(keys, key=_registration), trainable)
    shadow = content["ema"]["shadow_params"]
    if len(shadow) != len(names):
        raise UserError(f"{path}: ema.shadow_params has {len(shadow)} tensors, expected {len(names)} as in model")
    for name, value in zip(names, shadow):
        if value.shape != model[name].shape:
            found, expected = tuple(value.shape), tuple(model[name].shape)
            raise UserError(f"{path}: ema.shadow_params for {name} has shape {found}, expected {expected}")
    return _named(path, convert, {**model, **dict(zip(names, shadow))})


def detect(state: Mapping[str, Tensor]) -> str:
    """Name of the preset in `PRESETS` whose state dict has the keys and shapes of `state` (in our names).

    Raises:
        UserError: none fits; the message names the first difference from the nearest preset.
    """
    return official.preset(state, PRESETS)


def pretrained(path: str, which: Literal["ema", "raw"] = "ema", dropout: float = 0.0, centred: bool = True) -> NCSNpp:
    """An NCSNpp with the weights of an official checkpoint; the preset is found from the shapes.

    Args:
        path: official file `checkpoint_<k>.pth`.
        which: averaged or raw weights.
        dropout: for further training.
        centred: False for LSUN church and bedroom, whose data lie in [0, 1]; the file does not tell.

    Raises:
        UserError: see `load` and `detect`.
    """
    state = load(path, which)
    net = PRESETS[_named(path, detect, state)](dropout=dropout)
    net.centred = centred
    net.load_state_dict(state)
    return net


def load_into(net: nn.Module, path: str | Path, which: Literal["ema", "raw"] = "ema") -> None:
    """Load an official checkpoint into `net`, an NCSNpp of any size.

    Raises:
        UserError: see `load`; or the network has other keys or shapes than the checkpoint.
    """
    official.fill(net, load(path, which), path)


def _read(path: Path) -> dict[str, Any]:
    content = official.read(path, "an official Rectified Flow checkpoint")
    keys = sorted(content) if isinstance(content, dict) and all(isinstance(k, str) for k in content) else []
    if not {"model", "ema"} <= set(keys):
        found = ", ".join(keys[:6]) or type(content).__name__
        raise UserError(f"{path}: found {found}; expected a dict with model and ema (official Rectified Flow layout)")
    model, ema = content["model"], content["ema"]
    if not isinstance(model, dict) or not all(isinstance(v, Tensor) for v in model.values()):
        raise UserError(f"{path}: model is not a state dict of tensors")
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list) or not all(isinstance(v, Tensor) for v in shadow):
        raise UserError(f"{path}: ema.shadow_params is not a list of tensors")
    return content


def _registration(key: str) -> tuple[int, int, int]:
    """Place of an official key in the order in which the official layers register their parameters."""
    index, layer, leaf = _split(key.removeprefix("module."), "all_modules")
    table = ATTENTION if layer.startswith("NIN_") else BLOCK
    return index, list(table).index(layer) if layer in table else -1, 0 if leaf in ("weight", "W") else 1


def _named(path: str | Path, function: Callable, argument: Any) -> Any:
    try:
        return function(argument)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _split(key: str, root: str) -> tuple[int, str, str]:
    match = re.fullmatch(rf"{root}\.(\d+)\.(?:(\w+)\.)?(\w+)", key)
    if match is None:
        raise UserError(f"unexpected key '{key}', expected '{root}.<index>.<name>' of an unconditional NCSN++")
    return int(match[1]), match[2] or "", match[3]
