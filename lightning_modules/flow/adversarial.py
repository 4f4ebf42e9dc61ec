"""Losses of a decoder and of its discriminator: hinge (arXiv 1705.02894), LeCam (arXiv 2104.03310), Haar wavelets."""

import torch
from torch import Tensor
from torch.nn import functional as F


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of a discriminator: `(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2` of its logits."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def lecam(real: Tensor, fake: Tensor, past_real: Tensor, past_fake: Tensor) -> Tensor:
    """`max(0, real - past_fake)^2 + max(0, past_real - fake)^2` of mean logits and the running means of such."""
    return F.relu(real - past_fake).square() + F.relu(past_real - fake).square()


def haar(x: Tensor) -> Tensor:
    """Orthonormal Haar coefficients of clips `(B, T, C, H, W)`, one level in time, height and width.

    Returns:
        `(B, T / 2, C, H / 2, W / 2, 8)`; odd sides repeat their last entry first.
    """
    x = x[..., None]
    for dim in (1, 3, 4):
        if x.shape[dim] % 2:
            x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)
        even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
        x = torch.cat([even + odd, even - odd], -1) * 0.5**0.5
    return x


def haar_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the Haar coefficients of clips."""
    return haar(a - b).abs().mean()
