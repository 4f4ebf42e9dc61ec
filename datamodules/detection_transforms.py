"""Size, mirror image and padding of images and their boxes, by torchvision's transforms."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from penstock.lightning_modules.errors import UserError

LEAST = 32


@dataclass(frozen=True)
class Resizing:
    """Sizes of images whose aspect is kept.

    Args:
        sides: shorter sides to choose from; evaluation takes the last.
        longest: the longer side is at most this, and then the shorter one is less than asked for.

    Raises:
        UserError: a side below 32, none, or `longest` below one of them.
    """

    sides: tuple[int, ...]
    longest: int

    def __post_init__(self) -> None:
        if not self.sides or min(self.sides) < LEAST:
            raise UserError(f"data.min_size: found {list(self.sides)}, expected one or more sides of at least {LEAST}")
        if self.longest < max(self.sides):
            raise UserError(f"data.max_size: found {self.longest}, expected at least data.min_size={max(self.sides)}")

    def size(self, height: int, width: int, which: int = -1) -> tuple[int, int]:
        """Height and width of an image with the `which`-th shorter side, rounded."""
        scale = min(self.sides[which] / min(height, width), self.longest / max(height, width))
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 `(3, H, W)`, of any strides, at another size, contiguous: bilinear, antialiased."""
    return v2.resize(tv_tensors.Image(image), list(size), antialias=True).as_subclass(Tensor).contiguous()


def transformed(
    image: Tensor, boxes: Tensor, size: tuple[int, int], original: tuple[int, int], mirrored: bool
) -> tuple[Tensor, Tensor]:
    """An image with its boxes at another size, perhaps mirrored left to right.

    Args:
        image: uint8 `(3, H, W)`, of the original size or already of the new one.
        boxes: float32 `(n, 4)`, x1 y1 x2 y2 in pixels of the original size.
        size: new height and width.
        original: height and width that the boxes belong to.
        mirrored: mirror both.

    Returns:
        uint8 `(3, *size)` and float32 `(n, 4)`.
    """
    found = tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=original)
    image, found = resized(image, size), v2.resize(found, list(size))
    if mirrored:
        image, found = v2.horizontal_flip(image), v2.horizontal_flip(found)
    return image, found.as_subclass(Tensor)


def transformed_masks(masks: Tensor, size: tuple[int, int], mirrored: bool) -> Tensor:
    """uint8 `(n, H, W)` at another size (height, width), nearest pixels, perhaps mirrored left to right."""
    found = v2.resize(tv_tensors.Mask(masks), list(size))
    return (v2.horizontal_flip(found) if mirrored else found).as_subclass(Tensor)


def padded(images: Sequence[Tensor], multiple: int) -> Tensor:
    """Images `(3, h, w)` of any sizes as one `(B, 3, H, W)`, zero at the right and bottom of the smaller ones.

    `H` and `W` are the largest height and width, rounded up to a multiple of `multiple`.
    """
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*(image.shape[1:] for image in images)))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(batch, images):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def without_padding(image: Tensor, size: Tensor) -> Tensor:
    """Float `(B, 1, H, W)`: 1 where a padded batch `(B, 3, H, W)` has pixels of images of `size` `(B, 2)`, else 0."""
    rows, columns = (
        (torch.arange(side, device=image.device) < own[:, None]).float()
        for side, own in zip(image.shape[2:], size.T.to(image.device, non_blocking=True))
    )
    return (rows[:, :, None] * columns[:, None, :])[:, None]
