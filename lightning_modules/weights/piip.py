"""Checkpoints of PIIP's code (github.com/OpenGVLab/PIIP) under the names of `nets`: classifiers, backbones, Mask R-CNN
as mmdetection has it, UperNet as mmsegmentation has it."""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.checkpoints import load_checkpoint, load_weights, raw_weights
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.convnext import timm_name

Task = Literal["classifier", "detector", "segmenter"]

PARTS = [
    (r"^backbone\.", ""),
    (r"^branch(\d)\.convnext_model\.(.*)", lambda m: f"branch{m[1]}.{timm_name(m[2])}"),
    (r"^branch(\d)\.", lambda m: f"pyramid.branches.{int(m[1]) - 1}."),
    (r"\.patch_embed\.proj\.", ".patch_embed."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^interactions\.(\d+)\.interaction_units_(\d)\d\.", lambda m: f"pyramid.interactions.{m[1]}.{int(m[2]) - 1}."),
    (r"\.branch2to1_proj\.", ".to_coarse."),
    (r"\.branch1to2_proj\.", ".to_fine."),
    (r"\.branch2to1_injector\.", ".coarse."),
    (r"\.branch1to2_injector\.", ".fine."),
    (r"\.(?:ca_gamma|ca_weight)$", ".attn_gate"),
    (r"\.(?:cffn_gamma|cffn_weight)$", ".ffn_gate"),
    (r"\.ffn\.dwconv\.dwconv\.", ".ffn.conv."),
    (r"\.attn\.wq\.", ".attn.query_proj."),
    (r"\.attn\.wk\.", ".attn.key_proj."),
    (r"\.attn\.wv\.", ".attn.value_proj."),
    (r"(\.(?:coarse|fine)\.attn)\.proj\.", r"\1.output_proj."),
    (r"^w(\d)$", lambda m: f"merge.weights.{int(m[1]) - 1}"),
    (r"^merge_branch(\d)\.", lambda m: f"merge.projections.{int(m[1]) - 1}."),
    (r"^intermediate_merging_(\d+)_w(\d)$", lambda m: f"merges.{m[1]}.weights.{int(m[2]) - 1}"),
    (r"^intermediate_merging_(\d+)_branch(\d)\.", lambda m: f"merges.{m[1]}.projections.{int(m[2]) - 1}."),
    (r"^fpn1\.", "fpn.quarter."),
    (r"^fpn2\.0\.", "fpn.eighth."),
    (r"^cls_(norm|head)\.", r"merged.\1."),
]
SCALARS = r"(^|\.)merges?\.(\d+\.)?weights\.\d+$"
UNUSED = r"\.convnext_model\.layernorm\.|\.relative_position_index$"
"""The final norm of a ConvNeXt, which no one applies, and what follows from the side of windows."""


def own_name(name: str) -> str:
    """The name in `PiipClassifier`, `PiipBackbone` or `PiipHybridBackbone` of a tensor of the official code."""
    for pattern, replacement in PARTS:
        name = re.sub(pattern, replacement, name)
    return name


def own_state(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a classifier or a backbone; positions of class tokens, which the official code drops, go."""
    own = {own_name(name): value for name, value in official.items() if not re.search(UNUSED, name)}
    for name, value in own.items():
        if name.endswith("pos_embed"):
            own[name] = value[:, value.shape[1] - math.isqrt(value.shape[1]) ** 2 :]
        elif re.search(SCALARS, name):
            own[name] = value.reshape(1, 1, 1)
    if "merged.head.weight" in own:
        own = {f"merged.{name}" if name.startswith("merge.") else name: value for name, value in own.items()}
    return own


UNITS = {"conv": "0", "bn": "1"}
SEGMENTER = [
    (r"^decode_head\.psp_modules\.(\d)\.1\.", r"head.pooling.pools.\1.1."),
    (r"^decode_head\.bottleneck\.", "head.pooling.fuse."),
    (r"^decode_head\.lateral_convs\.", "head.lateral."),
    (r"^decode_head\.fpn_convs\.", "head.smooth."),
    (r"^decode_head\.fpn_bottleneck\.", "head.fuse."),
    (r"^decode_head\.conv_seg\.", "head.classify."),
    (r"^auxiliary_head\.convs\.0\.", "auxiliary.0."),
    (r"^auxiliary_head\.conv_seg\.", "auxiliary.2."),
    (r"^((?:head|auxiliary)\..*)(conv|bn)\.(\w+)$", lambda m: f"{m[1]}{UNITS[m[2]]}.{m[3]}"),
]
DETECTOR = [
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"net.backbone.pyramid.fpn.inner_blocks.\1.0."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"net.backbone.pyramid.fpn.layer_blocks.\1.0."),
    (r"^rpn_head\.rpn_conv\.", "net.rpn.head.conv.0.0."),
    (r"^rpn_head\.rpn_cls\.", "net.rpn.head.cls_logits."),
    (r"^rpn_head\.rpn_reg\.", "net.rpn.head.bbox_pred."),
    (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "net.roi_heads.box_head.fc6."),
    (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "net.roi_heads.box_head.fc7."),
    (r"^roi_head\.bbox_head\.fc_cls\.", "net.roi_heads.box_predictor.cls_score."),
    (r"^roi_head\.bbox_head\.fc_reg\.", "net.roi_heads.box_predictor.bbox_pred."),
    (r"^roi_head\.mask_head\.convs\.(\d)\.conv\.", r"net.roi_heads.mask_head.\1.0."),
    (r"^roi_head\.mask_head\.upsample\.", "net.roi_heads.mask_predictor.conv5_mask."),
    (r"^roi_head\.mask_head\.conv_logits\.", "net.roi_heads.mask_predictor.mask_fcn_logits."),
]


def segmenter_state(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `SegmentationNet` on a pyramid."""
    return _of_host(official, "backbone.", SEGMENTER)


def detector_state(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `MaskDetector` on a pyramid: torchvision's background is the first class, not the last."""
    own = _of_host(official, "net.backbone.backbone.", DETECTOR)
    for name, value in own.items():
        if name.startswith("net.roi_heads.box_predictor.cls_score."):
            own[name] = value.roll(1, 0)
        elif name.startswith("net.roi_heads.box_predictor.bbox_pred."):
            own[name] = torch.cat([torch.zeros_like(value[:4]), value])
        elif name.startswith("net.roi_heads.mask_predictor.mask_fcn_logits."):
            own[name] = torch.cat([torch.zeros_like(value[:1]), value])
    return own


def _of_host(official: dict[str, Tensor], place: str, rules: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """Of a network that holds a backbone at `place`."""
    below = {name: value for name, value in official.items() if name.startswith("backbone.")}
    found = {f"{place}{name}": value for name, value in own_state(below).items()}
    for name, value in official.items():
        if name not in below:
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            found[name] = value
    return found


STATES: dict[Task, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "classifier": own_state,
    "detector": detector_state,
    "segmenter": segmenter_state,
}
KINDS = {  # beginnings of names by what has them
    "decode_head.": "segmenter",
    "roi_head.": "detector",
    "bbox_head.": "detector with DINO's queries",
    "branch1.": "classifier",
    "backbone.": "backbone",
}
EXPECTED: dict[Task, str] = {
    "classifier": "branch1.*, interactions.*, ...",
    "detector": "backbone.branch1.*, neck.*, rpn_head.*, roi_head.*",
    "segmenter": "backbone.branch1.*, decode_head.*, auxiliary_head.*",
}
SHARDS = "mp_rank_00_model_states.pt"


def load_released(net: nn.Module, file: str, task: Task) -> bool:
    """Fills a network with weights of a file of the authors, or of a checkpoint of this program (the raw ones).

    Args:
        net: `PiipClassifier`, `MaskDetector` or `SegmentationNet`, by `task`.
        file: A checkpoint, or a folder of DeepSpeed with one.
        task: What the network is.

    Returns:
        Whether the file is the authors'.

    Raises:
        UserError: no such file, one that is damaged or holds other objects, or the weights of another model.
    """
    path, name = Path(file).expanduser(), f"model.initial={file}"
    if path.is_dir():
        if not (path / SHARDS).is_file():
            raise UserError(f"{name}: no {SHARDS} in this folder; expected a checkpoint, or a folder with this file")
        path = path / SHARDS
    with torch.serialization.safe_globals([argparse.Namespace]):  # of plain values: the words of a training
        content = load_checkpoint(path)
    state, released = _state(content), False
    if not state or not all(key.startswith("net.") for key in state):
        if (kind := _kind(state)) != task:
            found = f"a {kind}" if kind else f"the entries {', '.join(sorted(state or map(str, content))[:3])}, ..."
            raise UserError(
                f"{name}: found {found}, expected a {task}: {EXPECTED[task]} of PIIP's code, or a checkpoint of fit"
            )
        state, released = STATES[task](state), True
    else:
        state = {key.removeprefix("net."): value for key, value in state.items()}
    load_weights(net, {"state_dict": state}, name)
    return released


def _state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file by Lightning or mmcv, DeepSpeed or DeiT's code, or of a state dict alone."""
    places = (raw_weights(content), content.get("module"), content.get("model"), content)
    state = next((place for place in places if isinstance(place, Mapping) and place), {})
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _kind(state: Mapping[str, Tensor]) -> str | None:
    """What of PIIP's code has such entries."""
    kinds = (kind for begin, kind in KINDS.items() if any(key.startswith(begin) for key in state))
    return next(kinds, None)
