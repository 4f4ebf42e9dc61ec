"""Masks of classes: the value that is no class, their loss, and scores of large images from overlapping windows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255
AT_ONCE = 8  # windows in a call


def pixel_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels that have a class, 0 where none has one.

    Args:
        scores: `(B, K, h, w)`; enlarged to the mask's size, bilinear.
        mask: uint8 `(B, H, W)`, 0 to K - 1, or `IGNORED`.
    """
    scores, mask = resized_scores(scores.float(), tuple(mask.shape[1:])), mask.long()
    total = F.cross_entropy(scores, mask, ignore_index=IGNORED, reduction="sum")
    return total / (mask != IGNORED).sum().clamp(min=1)


def resized_scores(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores `(B, K, *size)` of `(B, K, h, w)`, bilinear."""
    if tuple(scores.shape[2:]) == size:
        return scores
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def slid(scores_of: Callable[[Tensor], Tensor], image: Tensor, window: int, stride: int) -> Tensor:
    """Scores `(B, K, H, W)` of images `(B, C, H, W)`: where windows overlap, the mean of theirs.

    Windows begin every `stride` pixels, the last one as far as the image reaches; where the image is smaller, they are
    as large as it.

    Args:
        scores_of: Parts `(b, C, h, w)` to scores `(b, K, h, w)`.
        image: Images.
        window: Side, pixels.
        stride: From one window to the next, pixels.
    """
    height, width = (min(window, side) for side in image.shape[2:])
    places = window_places(image.shape[2:], window, stride)
    parts = torch.stack([image[..., y : y + height, x : x + width] for y, x in places])
    found = torch.cat([scores_of(part) for part in parts.flatten(0, 1).split(AT_ONCE)]).unflatten(0, parts.shape[:2])
    total = found.new_zeros(len(image), found.shape[2], *image.shape[2:])
    count = found.new_zeros(image.shape[2:])
    for (y, x), scores in zip(places, found):
        total[..., y : y + height, x : x + width] += scores
        count[y : y + height, x : x + width] += 1
    return total / count


def window_places(size: Sequence[int], window: int, stride: int) -> list[tuple[int, int]]:
    """First row and column of each window, see `slid`, in an image of height and width `size`."""
    rows, columns = (
        [min(k * stride, max(side - window, 0)) for k in range(-(-max(side - window, 0) // stride) + 1)]
        for side in size
    )
    return [(y, x) for y in rows for x in columns]
