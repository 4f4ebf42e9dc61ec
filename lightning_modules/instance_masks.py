"""Masks of objects as COCO writes them: polygons and run lengths (pycocotools' format, by faster-coco-eval)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco
from torch import Tensor

from penstock.lightning_modules.errors import UserError

Rle = dict[str, Any]
"""`size` [height, width] and `counts`, the runs column by column, compressed."""


def run_lengths(segmentation: Any, height: int, width: int, where: str) -> Rle:
    """The `segmentation` of an annotation: polygons of x, y, or run lengths, compressed or not.

    Raises:
        UserError: it is neither, or of another size.
    """
    if isinstance(segmentation, list) and segmentation and all(_is_polygon(part) for part in segmentation):
        return coco.merge(coco.frPyObjects([list(map(float, part)) for part in segmentation], height, width))
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        if list(segmentation["size"]) != [height, width]:
            raise UserError(f"{where}: found a mask of {segmentation['size']} pixels, expected [{height}, {width}]")
        if isinstance(segmentation["counts"], list):
            return coco.frPyObjects([segmentation], height, width)[0]
        counts = segmentation["counts"]
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    raise UserError(
        f"{where}: found 'segmentation' {str(segmentation)[:40]!r}, expected polygons of at least three points or run "
        "lengths"
    )


def encoded(masks: Tensor) -> list[Rle]:
    """Masks `(n, H, W)`, true or 1 inside."""
    if not len(masks):
        return []
    columns = np.asfortranarray(masks.to("cpu", torch.uint8).permute(1, 2, 0).numpy())
    return coco.encode(columns)


def written(mask: Rle) -> dict[str, Any]:
    """Run lengths as JSON takes them."""
    return {"size": [int(side) for side in mask["size"]], "counts": mask["counts"].decode()}


def decoded(masks: Sequence[Rle], size: tuple[int, int]) -> Tensor:
    """uint8 `(n, H, W)` of masks of (height, width) `size`."""
    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(coco.decode(list(masks)).transpose(2, 0, 1)))


def _is_polygon(part: Any) -> bool:
    numbers = isinstance(part, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in part)
    return numbers and len(part) >= 6 and len(part) % 2 == 0
