"""Official checkpoints of STARFlow (arXiv 2506.06276), STARFlow-V (arXiv 2511.20462) and TARFlow (arXiv 2412.06329).

A file is a flat state dict: `blocks.<i>.*` of the flow, `learnable_self_denoiser.*` of the denoiser, and buffers that
nothing reads (`var`, `attn_mask`, `feat_rope.freqs_*`). The names in blocks are ours; `var` is read in TARFlow only.

    net = pretrained("starflow_3B_t2i_256x256.pth")              # also a class_path for a net in YAML
    denoiser = pretrained_denoiser("starflow-v_7B_t2v_caus_480p_v3.pth")
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser, starflow_v_7b_denoiser
from penstock.lightning_modules.nets.starflow import starflow_v_7b, starflow_xl, starflow_xxl
from penstock.lightning_modules.nets.tarflow import tarflow_afhq, tarflow_imagenet64, tarflow_imagenet128
from penstock.lightning_modules.weights import official

DENOISER = "learnable_self_denoiser."
UNREAD = re.compile(r"feat_rope\.freqs_(cos|sin)|blocks\.\d+\.attn_mask")
FLOWS: dict[str, Callable[[], AutoregressiveFlow]] = {
    "starflow_xl": starflow_xl,
    "starflow_xxl": starflow_xxl,
    "starflow_v_7b": starflow_v_7b,
    "tarflow_afhq": tarflow_afhq,
    "tarflow_imagenet64": tarflow_imagenet64,
    "tarflow_imagenet64_uncond": lambda: tarflow_imagenet64(num_classes=0),
    "tarflow_imagenet128": tarflow_imagenet128,
}
DENOISERS: dict[str, Callable[[], nn.Module]] = {"starflow_v_7b": starflow_v_7b_denoiser}


def convert(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The states of our flow and of our denoiser (empty where there is none) from an official one.

    Raises:
        UserError: a key that is not of the official layout.
    """
    flow, denoiser = {}, {}
    with_start = any(key.endswith(".sos_embed") for key in state)
    for key, value in state.items():
        if UNREAD.fullmatch(key) or (key == "var" and with_start):
            continue
        if key.startswith(DENOISER):
            denoiser[key.removeprefix(DENOISER)] = value
        elif key == "var" or re.fullmatch(r"blocks\.\d+\.[\w.]+", key):
            flow[key] = value
        else:
            raise UserError(f"unexpected key '{key}', expected blocks.<i>.*, {DENOISER}* or a buffer of them")
    return flow, denoiser


def invert(flow: Mapping[str, Tensor], denoiser: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The official state from ours, without the buffers that nothing reads."""
    return {**flow, **{DENOISER + key: value for key, value in (denoiser or {}).items()}}


def pretrained(path: str) -> AutoregressiveFlow:
    """The flow of an official file, in the file's precision; which one it is follows from the shapes.

    Raises:
        UserError: the file is absent, cut short, holds other objects, or fits none of our flows.
    """
    return _filled(path, _read(path)[0], FLOWS)


def pretrained_denoiser(path: str) -> FlowDenoiser:
    """The denoiser of an official file of STARFlow-V, whose every layer looks one frame ahead.

    Raises:
        UserError: as `pretrained`, or a file without one.
    """
    state = _read(path)[1]
    if not state:
        raise UserError(f"{path}: no {DENOISER}* in it, expected a file of STARFlow-V")
    return _filled(path, state, DENOISERS)


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    file = Path(path).expanduser()
    state = official.read(file, "an official STARFlow or TARFlow checkpoint", mmap=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: no flat state dict of tensors, expected an official STARFlow or TARFlow checkpoint")
    try:
        return convert(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _filled(path: str, state: dict[str, Tensor], presets: Mapping[str, Callable[[], Any]]) -> Any:
    try:
        name = official.preset(state, presets)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    with torch.device("meta"):
        net = presets[name]()
    net.load_state_dict(state, assign=True)
    return net
