"""A convolutional discriminator that judges patches (arXiv 1611.07004), as STARFlow's decoder is tuned against."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Blur(nn.Module):
    """Halves the sides by the kernel (1, 3, 3, 1) / 8 in both directions (arXiv 1904.11486); odd sides round up."""

    def __init__(self):
        super().__init__()
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(kernel, kernel)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, ceil(H / 2), ceil(W / 2))`; outside is 0."""
        height, width = x.shape[-2:]
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])


class PatchDiscriminator(nn.Module):
    """Convolutions that halve the sides at each stage, the largest of 16x16 regions, and a logit for each region.

    Args:
        channels: Of the images.
        width: Channels of the first stage, a multiple of `groups`; the second has as many, then each twice the last.
        stages: Halvings, at least 1.
        groups: Of the group normalisation.

    Raises:
        ValueError: no stage, or a width that `groups` does not divide.
    """

    def __init__(self, channels: int = 3, width: int = 128, stages: int = 3, groups: int = 32):
        super().__init__()
        if stages < 1 or width % groups:
            raise ValueError(f"{stages} stages of width {width}: expected at least 1 and a multiple of groups={groups}")
        widths = [width * 2**stage for stage in range(stages)]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 5, padding="same"), nn.LeakyReLU(0.1)]
        for before, after in zip([width, *widths], widths):
            layers += [nn.Conv2d(before, after, 3, padding="same"), Blur()]
            layers += [nn.GroupNorm(groups, after), nn.LeakyReLU(0.1)]
        layers += [nn.AdaptiveMaxPool2d(16), nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 5, padding="same"))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 1, 16, 16)` of images `(B, C, H, W)` in [0, 1]; above 0 is real."""
        return self.layers(images)
