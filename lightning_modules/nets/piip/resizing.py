"""Pretrained position tables and patch kernels for other grids and patches, and images for branches."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def resized_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A table of positions `(1, h w, D)` of a square grid for another (H, W): bicubic, float32 at least."""
    side = math.isqrt(table.shape[1])
    if (side, side) == tuple(grid):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32)).transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(wide, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2).to(table)


def resized_kernel(weight: Tensor, patch: int) -> Tensor:
    """Kernels `(D, C, p, p)` for patches of another side: bicubic, values as they are."""
    if weight.shape[-1] == patch:
        return weight
    return F.interpolate(weight, size=(patch, patch), mode="bicubic", align_corners=False)


def resized_image(image: Tensor, ratio: float) -> Tensor:
    """Images `(B, C, H, W)` at `floor(ratio H)`, `floor(ratio W)`, ratio at most 1: bilinear, without antialiasing.

    Places are by the ratio itself, also where the sizes are no whole numbers.
    """
    if ratio >= 1:
        return image
    return F.interpolate(image, scale_factor=ratio, mode="bilinear", align_corners=False)
