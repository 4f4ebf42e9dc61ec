"""Where is an image unlikely? Maps and scores of a flow's noise (arXiv 2111.07677; public implementations)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def anomaly_map(z: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """`A = mean_l upsample(-exp(-1/2 mean_c z_l^2))`, in [-1, 0): larger is more anomalous.

    Args:
        z: Noise of each scale `(B, C_l, H_l, W_l)`.
        size: (H, W) of the images.

    Returns:
        `(B, 1, H, W)` in float32 at least, whatever the noise's dtype: exp underflows early in half precision.
    """
    wide = (scale.to(torch.promote_types(scale.dtype, torch.float32)) for scale in z)
    return map_of_means([scale.square().mean(1, keepdim=True) for scale in wide], size)


def map_of_means(means: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The same of `mean_c z_l^2` `(B, 1, H_l, W_l)`."""
    total = 0
    for mean in means:
        total = total + F.interpolate(-torch.exp(-0.5 * mean), size, mode="bilinear", align_corners=False)
    return total / len(means)


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Maps `(B, 1, H, W)` after a Gaussian of standard deviation `sigma` pixels, cut at 4 sigma; edges are mirrored."""
    radius = min(int(4 * sigma + 0.5), min(maps.shape[-2:]) - 1)
    if radius < 1:
        return maps
    x = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    weights = torch.softmax(-0.5 * (x / sigma).square(), 0)
    maps = F.pad(maps, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(maps, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))


def image_score(maps: Tensor, top: float = 0.0) -> Tensor:
    """Score of each image `(B,)`: the largest value of its map `(B, 1, H, W)`, or the mean of a share of its largest.

    Args:
        maps: Anomaly maps.
        top: That share, in [0, 1]; at least one pixel counts.
    """
    flat = maps.flatten(1)
    count = max(1, round(top * flat.shape[1]))
    return flat.amax(1) if count == 1 else flat.topk(count, 1, sorted=False).values.mean(1)
