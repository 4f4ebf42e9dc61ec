"""Aspect ratios that clips and images are sorted by (arXiv 2511.20462, released code)."""

import math
from typing import Literal, get_args

Aspect = Literal["21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21"]
ASPECTS: tuple[str, ...] = get_args(Aspect)


def ratio(aspect: str) -> float:
    """Width over height of `width:height`."""
    across, down = map(int, aspect.split(":"))
    return across / down


def aspect_size(aspect: str, size: float, multiple: int) -> tuple[int, int]:
    """(height, width) of about `size`^2 pixels in the ratio `aspect` (width:height), rounded to multiples."""
    sides = size * ratio(aspect) ** -0.5, size * ratio(aspect) ** 0.5
    return tuple(max(multiple, round(side / multiple) * multiple) for side in sides)


def nearest_aspect(height: float, width: float) -> str:
    """The one of `ASPECTS` whose logarithm is nearest to that of width over height."""
    return min(ASPECTS, key=lambda aspect: abs(math.log(width / height / ratio(aspect))))
