"""UperNet, arXiv 1807.10221: classes of pixels from the maps of a backbone, merged from coarse to fine.

The shape is that of mmsegmentation's `UPerHead` with an auxiliary `FCNHead`, on which the papers' numbers rest.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.map_backbone import MapBackbone

MAPS, AUXILIARY = 4, 2
conv_unit = partial(Conv2dNormActivation, norm_layer=nn.BatchNorm2d, activation_layer=nn.ReLU)


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of another, bilinear."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """A map beside its means over grids of several sizes, arXiv 1612.01105 section 3.2.

    Args:
        in_channels: Of the map.
        channels: Of each mean, and of the result.
        scales: Cells of the grids along a side.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_unit(in_channels, channels, 1)) for scale in scales
        )
        self.fuse = conv_unit(in_channels + len(scales) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` of `(B, in_channels, H, W)`."""
        return self.fuse(torch.cat([x, *(enlarged(pool(x), x) for pool in self.pools)], 1))


class UperHead(nn.Module):
    """Scores on the grid of the finest map, arXiv 1807.10221 section 3.1.

    Args:
        in_channels: Of the maps, the finest first.
        channels: Of all between.
        num_classes: K.
        scales: See `PyramidPooling`.
        dropout: Of whole channels before the scores.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.pooling = PyramidPooling(in_channels[-1], channels, scales)
        self.lateral = nn.ModuleList(conv_unit(width, channels, 1, inplace=False) for width in in_channels[:-1])
        self.smooth = nn.ModuleList(conv_unit(channels, channels, inplace=False) for _ in in_channels[:-1])
        self.fuse = conv_unit(len(in_channels) * channels, channels)
        self.dropout, self.classify = nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """`(B, K, H_0, W_0)` of maps `(B, C_l, H_l, W_l)`."""
        levels = [*(lateral(x) for lateral, x in zip(self.lateral, maps)), self.pooling(maps[-1])]
        for k in reversed(range(len(self.lateral))):
            levels[k] = levels[k] + enlarged(levels[k + 1], levels[k])
        fine, *others = (*(smooth(x) for smooth, x in zip(self.smooth, levels)), levels[-1])
        fused = self.fuse(torch.cat([fine, *(enlarged(x, fine) for x in others)], 1))
        return self.classify(self.dropout(fused))


class FcnHead(nn.Sequential):
    """Scores of one map by one convolution, arXiv 1411.4038.

    Args:
        in_channels: Of the map.
        channels: Between.
        num_classes: K.
        dropout: Of whole channels before the scores.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__(conv_unit(in_channels, channels), nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))


class SegmentationNet(nn.Module):
    """Images `(B, 3, H, W)` in [-1, 1] to scores of the classes of their pixels.

    Args:
        backbone: Of four maps, each with cells of twice the side of those before.
        num_classes: K.
        channels: Of the head.
        auxiliary_channels: Of a second head on the third map, which only trains; None without.
        scales: See `PyramidPooling`.
        dropout: Of the heads.

    Raises:
        UserError: a backbone of other maps, or a number of classes that masks of 8 bits do not hold.
    """

    checkpoint_blocks = (Block,)

    def __init__(
        self,
        backbone: MapBackbone,
        num_classes: int,
        channels: int = 512,
        auxiliary_channels: int | None = 256,
        scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        if not 2 <= num_classes <= 255:
            raise UserError(f"net.num_classes: found {num_classes}, expected 2 to 255")
        strides = backbone.strides
        if len(strides) != MAPS or any(2 * a != b for a, b in pairwise(strides)):
            raise UserError(
                f"net.backbone: found maps of strides {strides}, of {backbone.about}; expected four, each twice "
                "the one before, such as [4, 8, 16, 32]"
            )
        self.backbone, self.num_classes = backbone, num_classes
        self.head = UperHead(backbone.channels, channels, num_classes, scales, dropout)
        self.auxiliary = None
        if auxiliary_channels is not None:
            self.auxiliary = FcnHead(backbone.channels[AUXILIARY], auxiliary_channels, num_classes, dropout)
        for module in self.modules():
            if isinstance(module, UperHead | FcnHead):
                module.apply(_initialize)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Scores `(B, K, h, w)` on the grid of the finest map; in training behind them those of the second head."""
        maps = self.backbone(image)
        found = [self.head(maps)]
        if self.training and self.auxiliary is not None:
            found.append(self.auxiliary(maps[AUXILIARY]))
        return found


def _initialize(module: nn.Module) -> None:
    """He's law for convolutions under a norm, small weights for those of scores."""
    if not isinstance(module, nn.Conv2d):
        return
    if module.bias is None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
