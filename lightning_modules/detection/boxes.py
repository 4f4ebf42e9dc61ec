"""Sizes, overlaps and non-maximum suppression of boxes in either pixel convention."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def sides(boxes: Tensor, extent: float = 0.0) -> Tensor:
    """Width and height `(n, 2)`."""
    return boxes[..., 2:] - boxes[..., :2] + extent


def area(boxes: Tensor, extent: float = 0.0) -> Tensor:
    """Area `(n,)`."""
    return sides(boxes, extent).prod(-1)


def centers(boxes: Tensor) -> Tensor:
    """Centre x and y `(n, 2)`."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def intersection(a: Tensor, b: Tensor, extent: float = 0.0) -> Tensor:
    """Common area `(n, m)` of each of `a` with each of `b`."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low + extent).clamp(min=0).prod(-1)


def iou(a: Tensor, b: Tensor, extent: float = 0.0) -> Tensor:
    """Intersection over union `(n, m)` of each of `a` with each of `b`."""
    both = intersection(a, b, extent)
    return both / (area(a, extent)[:, None] + area(b, extent)[None] - both)


def clipped(boxes: Tensor, size: tuple[float, float] | Tensor, extent: float = 0.0) -> Tensor:
    """Boxes cut at the border of an image of (height, width)."""
    height, width = size[0] - extent, size[1] - extent
    x, y = boxes[..., 0::2], boxes[..., 1::2]
    return torch.stack([x.clamp(0, width), y.clamp(0, height)], -1).flatten(-2)


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, limit: float, most: int, extent: float = 0.0) -> Tensor:
    """Numbers of the boxes kept, best first: none overlaps a better one of its class by more than `limit`.

    Args:
        boxes: `(n, 4)`.
        scores: `(n,)`.
        labels: `(n,)`.
        limit: Of the intersection over union.
        most: How many are kept.
        extent: Of the boxes.
    """
    reach = torch.cat([boxes[:, :2], boxes[:, 2:] + extent], 1)
    return batched_nms(reach, scores, labels, limit)[:most]
