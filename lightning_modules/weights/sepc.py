"""Weights of the official SEPC code (mmcv 0.4.3) under our names."""

import re
from collections.abc import Mapping

from torch import Tensor

from penstock.lightning_modules.errors import UserError

RULES = [
    (r"backbone\.(.+)", r"backbone.net.\1"),
    (r"neck\.(?:0\.)?lateral_convs\.(\d)\.conv\.(weight|bias)", r"pyramid.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.(?:0\.)?fpn_convs\.([012])\.conv\.(weight|bias)", r"pyramid.fpn.layer_blocks.\1.0.\2"),
    (r"neck\.(?:0\.)?fpn_convs\.3\.conv\.(weight|bias)", r"pyramid.fpn.extra_blocks.convs.0.\1"),
    (r"neck\.(?:0\.)?fpn_convs\.4\.conv\.(weight|bias)", r"pyramid.fpn.extra_blocks.convs.1.\1"),
    (r"neck\.1\.((?:Pconvs|lconv|cconv|lbn|cbn)\..+)", r"neck.\1"),
    (r"bbox_head\.(cls|reg)_convs\.(\d)\.conv\.(weight|bias)", r"neck.\1_convs.\2.\3"),
    (r"bbox_head\.retina_(cls|reg)\.(weight|bias)", r"head.\1.\2"),
]


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `nets.detector.Detector` that the official code calls otherwise.

    Its neck was trained with `lcconv_padding=0`, and boxes in the legacy pixel convention: both are options here.

    Args:
        state: The checkpoint's `state_dict`.

    Raises:
        UserError: an entry that is none of theirs.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in RULES:
            if match := re.fullmatch(pattern, key):
                found[match.expand(name)] = value
                break
        else:
            raise UserError(f"weights: found '{key}', expected backbone.*, neck.* or bbox_head.* of the official SEPC")
    return found
