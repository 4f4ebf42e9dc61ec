"""Anchors: boxes of several sizes and shapes at every cell of every level."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from penstock.lightning_modules.errors import UserError

Sizes = Sequence[tuple[int, int]]


class Anchors:
    """Boxes at every cell, in the order of y, x, ratio, scale.

    Args:
        strides: Of the levels, pixels.
        scales: Side of a square anchor over the stride.
        ratios: Height over width.
        legacy: Legacy pixel convention: centres at `stride * (j, i) + (stride - 1) / 2`, sides rounded.

    Attributes:
        extent: Of the boxes, see the package.

    Raises:
        UserError: no number in a list, or one that is not above 0.
    """

    def __init__(
        self,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        scales: Sequence[float] = tuple(4 * 2 ** (k / 3) for k in range(3)),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        legacy: bool = False,
    ):
        for name, values in (("strides", strides), ("scales", scales), ("ratios", ratios)):
            if not values or min(values) <= 0:
                raise UserError(f"anchors.{name}: found {list(values)}, expected numbers above 0")
        self.strides, self.scales, self.ratios = tuple(strides), tuple(scales), tuple(ratios)
        self.legacy, self.extent = legacy, float(legacy)

    @property
    def per_cell(self) -> int:
        return len(self.scales) * len(self.ratios)

    def base(self, stride: int) -> Tensor:
        """Anchors float32 `(A, 4)` of the first cell of a level."""
        root = torch.tensor(self.ratios, dtype=torch.float32).sqrt()[:, None]
        scales = torch.tensor(self.scales, dtype=torch.float32)[None]
        half = torch.stack([(stride / root * scales).flatten(), (stride * root * scales).flatten()], 1) - self.extent
        center = (stride - self.extent) / 2
        found = torch.cat([center - half / 2, center + half / 2], 1)
        return found.round() if self.legacy else found

    def grid(self, sizes: Sizes, device: torch.device | str = "cpu") -> list[Tensor]:
        """Anchors float32 `(H_l * W_l * A, 4)` of every level, whatever torch's default: they are kept for all runs.

        Args:
            sizes: (H_l, W_l) of the maps.
            device: Of the result.
        """
        return [_grid(self, stride, size, torch.device(device)) for stride, size in zip(self.strides, sizes)]

    def inside(self, sizes: Sizes, padded: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
        """Which anchors `(sum H_l * W_l * A,)` belong to a cell of an image padded to (height, width)."""
        return _inside(self, tuple(sizes), tuple(padded), torch.device(device))

    def __hash__(self) -> int:
        return hash((self.strides, self.scales, self.ratios, self.legacy))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Anchors) and vars(self) == vars(other)


@lru_cache(maxsize=256)
def _grid(anchors: Anchors, stride: int, size: tuple[int, int], device: torch.device) -> Tensor:
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    shifts = torch.stack([x, y, x, y], -1).view(-1, 1, 4)
    return (shifts + anchors.base(stride)).view(-1, 4).to(device)


@lru_cache(maxsize=64)
def _inside(anchors: Anchors, sizes: Sizes, padded: tuple[int, int], device: torch.device) -> Tensor:
    found = []
    for stride, (height, width) in zip(anchors.strides, sizes):
        y, x = (torch.arange(n, device=device) * stride < end for n, end in ((height, padded[0]), (width, padded[1])))
        found.append((y[:, None] & x[None]).flatten().repeat_interleave(anchors.per_cell))
    return torch.cat(found)
