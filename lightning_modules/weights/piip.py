"""Checkpoints of PIIP's code (github.com/OpenGVLab/PIIP) under the names of `nets.piip`."""

import math
import re

from torch import Tensor

from penstock.lightning_modules.nets.piip.convnext import timm_name

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
