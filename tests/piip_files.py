"""Checkpoints as PIIP's code writes them, of our small networks: names back."""

import re

from torch import Tensor

PYRAMID = [
    (r"^pyramid\.branches\.(\d)\.", lambda m: f"branch{int(m[1]) + 1}."),
    (r"\.patch_embed\.", ".patch_embed.proj."),
    (
        r"^pyramid\.interactions\.(\d+)\.(\d)\.",
        lambda m: f"interactions.{m[1]}.interaction_units_{int(m[2]) + 1}{int(m[2]) + 2}.",
    ),
    (r"\.to_coarse\.", ".branch2to1_proj."),
    (r"\.to_fine\.", ".branch1to2_proj."),
    (r"\.coarse\.", ".branch2to1_injector."),
    (r"\.fine\.", ".branch1to2_injector."),
    (r"\.attn_gate$", ".ca_gamma"),
    (r"\.ffn_gate$", ".cffn_gamma"),
    (r"\.ffn\.conv\.", ".ffn.dwconv.dwconv."),
    (r"^merge\.weights\.(\d)$", lambda m: f"w{int(m[1]) + 1}"),
    (r"^merge\.projections\.(\d)\.", lambda m: f"merge_branch{int(m[1]) + 1}."),
    (r"^fpn\.quarter\.", "fpn1."),
    (r"^fpn\.eighth\.", "fpn2.0."),
]
UPERNET = [
    (r"^head\.pooling\.pools\.(\d)\.1\.", r"decode_head.psp_modules.\1.1."),
    (r"^head\.pooling\.fuse\.", "decode_head.bottleneck."),
    (r"^head\.lateral\.", "decode_head.lateral_convs."),
    (r"^head\.smooth\.", "decode_head.fpn_convs."),
    (r"^head\.fuse\.", "decode_head.fpn_bottleneck."),
    (r"^head\.classify\.", "decode_head.conv_seg."),
    (r"^auxiliary\.0\.", "auxiliary_head.convs.0."),
    (r"^auxiliary\.2\.", "auxiliary_head.conv_seg."),
    (r"(?<!conv_seg)\.0\.(\w+)$", r".conv.\1"),
    (r"(psp_modules\.\d\.1|bottleneck|convs\.\d)\.1\.(\w+)$", r"\1.bn.\2"),
]
MASK_RCNN = [
    (r"^net\.backbone\.pyramid\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^net\.backbone\.pyramid\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^net\.rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^net\.rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^net\.rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^net\.roi_heads\.box_head\.fc(\d)\.", lambda m: f"roi_head.bbox_head.shared_fcs.{int(m[1]) - 6}."),
    (r"^net\.roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^net\.roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"^net\.roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"^net\.roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"^net\.roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
]


def renamed(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def official(own: dict[str, Tensor], place: str = "", rules: list = UPERNET) -> dict[str, Tensor]:
    """Of a network whose pyramid's names begin with `place`: nothing for a classifier."""
    found = {}
    for name, value in own.items():
        if name.startswith(place):
            key = ("backbone." if place else "") + renamed(name.removeprefix(place), PYRAMID)
            found[key] = value.reshape(()) if re.search(r"(^|\.)w\d$", key) else value
            continue
        key = renamed(name, rules)
        if "fc_cls" in key:
            value = value.roll(-1, 0)
        elif "fc_reg" in key or "conv_logits" in key:
            value = value[4 if "fc_reg" in key else 1 :]
        found[key] = value
    return found
