"""Crops of images with their masks for training, by torchvision's transforms: size, place, mirror image, colours."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from penstock.datamodules.detection_transforms import Resizing, resized
from penstock.lightning_modules.class_masks import IGNORED
from penstock.lightning_modules.errors import UserError

TRIES = 10


def _brighter(image: Tensor, levels: float) -> Tensor:
    return (image.float() + levels).round().clamp(0, 255).to(torch.uint8)


Change = Callable[[Tensor, float], Tensor]
CHANGES: dict[str, tuple[Change, tuple[float, float]]] = {
    "brightness": (_brighter, (-32, 32)),
    "contrast": (v2.adjust_brightness, (0.5, 1.5)),  # all levels times a number
    "saturation": (v2.adjust_saturation, (0.5, 1.5)),
    "hue": (v2.adjust_hue, (-0.1, 0.1)),
}


@dataclass(frozen=True)
class Cropping:
    """How training images become squares of one size.

    Args:
        side: of the squares, pixels.
        ratio: least and largest factor of the size that evaluation sees, drawn evenly.
        most: a place is drawn again, ten times at most, where one class has this share of a square's pixels or more, or
            where it shows only one.
        flip: mirror half of them left to right.
        distort: change brightness, contrast, saturation and hue, each of half of them.

    Raises:
        UserError: a value out of range.
    """

    side: int
    ratio: tuple[float, float] = (0.5, 2.0)
    most: float = 0.75
    flip: bool = True
    distort: bool = True

    def __post_init__(self) -> None:
        if self.side < 32:
            raise UserError(f"data.crop_size: found {self.side}, expected at least 32")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"data.ratio: found {list(self.ratio)}, expected two rising numbers above 0")
        if not 0 < self.most <= 1:
            raise UserError(f"data.cat_max_ratio: found {self.most}, expected a number in (0, 1]")


def cropped(
    image: Tensor, mask: Tensor, resizing: Resizing, how: Cropping, rng: np.random.Generator
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A training square of an image.

    Args:
        image: uint8 `(3, H, W)`.
        mask: uint8 `(H, W)`, classes or `IGNORED`.
        resizing: to the size that evaluation sees.
        how: the rest.
        rng: what is drawn from.

    Returns:
        uint8 `(3, side, side)` and `(side, side)`, with the height and width of what is image in them, at the upper
        left; beside it they are 0 and `IGNORED`.
    """
    factor = rng.uniform(*how.ratio)
    size = tuple(max(round(side * factor), 1) for side in resizing.size(*image.shape[1:]))
    image, mask = resized(image, size), resized_mask(mask, size)
    y, x = place(mask, how, rng)
    image, mask = (part[..., y : y + how.side, x : x + how.side] for part in (image, mask))
    if how.flip and rng.random() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    if how.distort:
        image = distorted(image, rng)
    height, width = mask.shape
    beside = (0, how.side - width, 0, how.side - height)
    return F.pad(image, beside), F.pad(mask, beside, value=IGNORED), (height, width)


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 `(H, W)` at another size, by the nearest pixel."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return v2.resize(mask[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]


def place(mask: Tensor, how: Cropping, rng: np.random.Generator) -> tuple[int, int]:
    """First row and column of a square, see `Cropping.most`; of ten that fail it, an eleventh."""
    for k in range(TRIES + 1):
        y, x = (int(rng.integers(0, max(side - how.side, 0) + 1)) for side in mask.shape)
        counts = torch.bincount(mask[y : y + how.side, x : x + how.side].flatten(), minlength=IGNORED)[:IGNORED]
        if k == TRIES or ((counts > 0).sum() > 1 and counts.max() < how.most * counts.sum()):
            break
    return y, x


def distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 `(3, H, W)` in other colours, as SSD has them (arXiv 1512.02325 code).

    Contrast is changed before the colours or, in half of the images, after them. Saturation and hue are torchvision's
    in place of OpenCV's.
    """
    order = ["brightness", "saturation", "hue"]
    order.insert(1 if rng.random() < 0.5 else 3, "contrast")
    for name in order:
        change, bounds = CHANGES[name]
        if rng.random() < 0.5:
            image = change(image, rng.uniform(*bounds))
    return image
