"""Which anchors answer for which objects."""

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.lightning_modules.detection.boxes import iou

IGNORED, NEGATIVE = -2, -1  # of anchors, in place of a box's number


class Thresholds(NamedTuple):
    """Of the intersection over union: at least `positive` is an object's, below `negative` is nobody's."""

    positive: float = 0.5
    negative: float = 0.4


RETINA = Thresholds()


def by_overlap(
    anchors: Tensor,
    boxes: Tensor,
    allowed: Tensor | None = None,
    limits: Thresholds = RETINA,
    extent: float = 0.0,
) -> Tensor:
    """RetinaNet's rule: number `(n,)` of the box of each anchor, `NEGATIVE`, or `IGNORED` between the thresholds.

    Besides, every box claims the anchors that overlap it most, all of them where several do so alike; where two boxes
    claim one anchor, the later has it.

    Args:
        anchors: `(n, 4)`.
        boxes: `(m, 4)`.
        allowed: bool `(n,)`; others are `IGNORED`.
        limits: Thresholds.
        extent: Of the boxes.
    """
    found = torch.full((len(anchors),), NEGATIVE, device=anchors.device)
    if len(boxes):
        overlaps = iou(anchors, boxes, extent)
        if allowed is not None:
            overlaps[~allowed] = -1
        best, owner = overlaps.max(1)
        found[best >= limits.negative] = IGNORED
        found = torch.where(best >= limits.positive, owner, found)
        claims = (overlaps == overlaps.amax(0)) & (overlaps >= 0)
        last = len(boxes) - 1 - claims.flip(1).int().argmax(1)
        found = torch.where(claims.any(1), last, found)
    return found if allowed is None else found.masked_fill(~allowed, IGNORED)
