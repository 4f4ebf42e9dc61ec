"""Weights of public FastFlow code (gathierry/FastFlow, anomalib, FrEIA) under our names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import FastFlowNet, Form
from penstock.lightning_modules.weights import official

STEP = re.compile(
    r"(?:model\.)?(?:nf_flows|fast_flow_blocks)\.(\d+)\.module_list\.(\d+)\."
    r"(global_scale|global_offset|w_perm|w_perm_inv|subnet\.(\d)\.(weight|bias))"
)
OTHER = re.compile(r"(?:model\.)?(?:norms\.(\d+\.(?:weight|bias))|feature_extractor\.(.+))")
SECOND = {"2": 2, "4": 2, "0": 0, "1": 0}  # with explicit padding layers the convolutions are 1 and 4, else 0 and 2


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `nets.fastflow.FastFlowNet` that public code calls otherwise.

    A permutation may be an index, or a one-hot matrix `(C, C, 1, 1)`. Which form of the clamp the weights were trained
    with is not in them: `tanh` for gathierry's and anomalib's files, `tanh_over_clamp` for those trained with a FrEIA
    after August 2023.

    Args:
        state: gathierry's `model_state_dict`, or the `state_dict` of anomalib's checkpoint.

    Raises:
        UserError: an entry that is none of theirs, or no flow at all.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if step := STEP.fullmatch(key):
            flow, number, kind, conv, part = step.groups()
            if kind == "w_perm_inv":
                continue
            name, value = _of_step(kind, value, conv, part)
            found[f"flows.{flow}.steps.{number}.{name}"] = value
        elif other := OTHER.fullmatch(key):
            norm, extractor = other.groups()
            found[f"norms.{norm}" if norm else f"backbone.net.{extractor}"] = value
        elif not key.startswith(("post_processor.", "pre_processor.", "image_metrics.", "pixel_metrics.")):
            raise UserError(f"weights: found '{key}', expected nf_flows.*, fast_flow_blocks.*, norms.* or a backbone's")
    if not any(key.startswith("flows.") for key in found):
        raise UserError("weights: no flow in them; expected nf_flows.* or fast_flow_blocks.*")
    return found


def pretrained(
    file: str, backbone: Backbone, image_size: int | Sequence[int] = 256, form: Form = "tanh"
) -> FastFlowNet:
    """The network of a checkpoint of gathierry's code or of anomalib, which also holds the backbone.

    Steps, kernels, widths and norms follow from the shapes in it.

    Args:
        file: `<epoch>.pt`, or Lightning's `.ckpt`.
        backbone: Of the model that it was trained with; its weights are taken from the file.
        image_size: Side or (height, width) that it was trained with.
        form: Of the clamp, see `converted`.

    Raises:
        UserError: the file is absent, holds other objects or another network.
    """
    path = Path(file).expanduser()
    content = official.read(path, "a FastFlow checkpoint of gathierry/FastFlow or anomalib")
    for key in ("model_state_dict", "state_dict"):
        content = content.get(key, content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: no state dict of tensors, expected a checkpoint of gathierry/FastFlow or anomalib")
    try:
        state = converted(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    first, second = (state.get(f"flows.0.steps.{k}.subnet.0.weight") for k in (0, 1))
    if first is None:
        raise UserError(f"{path}: no first step of a first flow in it, expected nf_flows.0.module_list.0.subnet.*")
    net = FastFlowNet(
        backbone,
        image_size,
        flow_steps=1 + max(int(key.split(".")[3]) for key in state if key.startswith("flows.0.steps.")),
        conv3x3_only=second is not None and second.shape[-1] == 3,
        hidden_ratio=_ratio(state),
        norm="sample" if "norms.0.weight" in state else None,
        form=form,
    )
    own = net.state_dict()
    official.fill(net, {k: v for k, v in state.items() if k in own or not k.startswith("backbone.")}, path)
    backbone.weights = "random"  # those of the file stay
    return net


def _ratio(state: Mapping[str, Tensor]) -> float:
    """The smallest that gives the hidden widths of all flows, each rounded down."""
    widths = [x.shape[:2] for key, x in state.items() if re.fullmatch(r"flows\.\d+\.steps\.0\.subnet\.0\.weight", key)]
    return max(hidden / passive for hidden, passive in widths) + 1e-9


def _of_step(kind: str, value: Tensor, conv: str | None, part: str | None) -> tuple[str, Tensor]:
    if conv is not None:
        return f"subnet.{SECOND[conv]}.{part}", value
    if kind == "w_perm":
        return "perm", value[:, :, 0, 0].argmax(1) if value.ndim == 4 else value.long()
    return kind, value.flatten()
