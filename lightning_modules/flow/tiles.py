"""Maps of images larger than what a network takes: overlapping tiles, blended."""

from collections.abc import Callable

import torch
from torch import Tensor


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixel of each tile along an axis: evenly spread, neighbours share at least `overlap` of their pixels.

    Args:
        length: Pixels of the image, at least `tile`.
        tile: Pixels of a tile.
        overlap: In [0, 1).
    """
    step = max(1, int(tile * (1 - overlap)))
    count = -(-(length - tile) // step) + 1
    return torch.linspace(0, length - tile, count, dtype=torch.float64).round().long().tolist()


def ramp(tile: int, like: Tensor) -> Tensor:
    """Weights of a tile's pixels along an axis, `(tile,)` in (0, 1]: linear from the middle to the edges."""
    x = torch.arange(tile, dtype=like.dtype, device=like.device)
    return 1 - ((x + 0.5) * 2 / tile - 1).abs() * (1 - 1 / tile)


def tiled(
    mapped: Callable[[Tensor], Tensor], image: Tensor, tile: tuple[int, int], overlap: float, batch: int = 32
) -> Tensor:
    """Map `(B, 1, H, W)` of images `(B, C, H, W)`: the mean of the tiles' maps, weighted by `ramp` both ways.

    Args:
        mapped: Tiles `(b, C, h, w)` to maps `(b, 1, h, w)`.
        image: Images, no smaller than a tile.
        tile: (h, w).
        overlap: See `starts`.
        batch: Tiles at once.

    Raises:
        ValueError: an image smaller than a tile.
    """
    size = tuple(image.shape[-2:])
    if size[0] < tile[0] or size[1] < tile[1]:
        raise ValueError(f"images of {size[0]}x{size[1]} pixels: expected at least {tile[0]}x{tile[1]}, a tile")
    places = [(y, x) for y in starts(size[0], tile[0], overlap) for x in starts(size[1], tile[1], overlap)]
    pieces = torch.stack([image[..., y : y + tile[0], x : x + tile[1]] for y, x in places])
    maps = torch.cat([mapped(part) for part in pieces.flatten(0, 1).split(batch)]).unflatten(0, pieces.shape[:2])
    weights = ramp(tile[0], maps)[:, None] * ramp(tile[1], maps)
    total, weight = maps.new_zeros(len(image), 1, *size), maps.new_zeros(size)
    for (y, x), piece in zip(places, maps):
        total[..., y : y + tile[0], x : x + tile[1]] += weights * piece
        weight[y : y + tile[0], x : x + tile[1]] += weights
    return total / weight
