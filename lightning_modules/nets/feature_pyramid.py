"""Feature pyramid network, arXiv 1612.03144, with the two coarse levels of one-stage detectors."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from penstock.lightning_modules.detection.ranges import at_least


class CoarseLevels(ExtraFPNBlock):
    """Levels made of the backbone's last map, each by a 3x3 convolution of stride 2 on the one before, no activation.

    Args:
        in_channels: Of the backbone's last map.
        channels: Of the levels.
        levels: How many.
    """

    def __init__(self, in_channels: int, channels: int, levels: int = 2):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels if k == 0 else channels, channels, 3, 2, 1) for k in range(levels)
        )

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        y = x[-1]
        for k, conv in enumerate(self.convs):
            y = conv(y)
            results, names = [*results, y], [*names, f"coarse{k}"]
        return results, names


class FeaturePyramid(nn.Module):
    """Maps `(B, C_l, H_l, W_l)` of a backbone to a pyramid of `channels` each, with coarser levels behind.

    Args:
        in_channels: C_l.
        channels: Of every level.
        coarse: Levels beyond the backbone's, made of its last map.
        pooled: In their place one of every other cell of the last level, as two-stage detectors have.

    Raises:
        UserError: no channels.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, coarse: int = 2, pooled: bool = False):
        super().__init__()
        at_least(1, net__channels=channels)
        extra = LastLevelMaxPool() if pooled else CoarseLevels(in_channels[-1], channels, coarse) if coarse else None
        self.fpn = FeaturePyramidNetwork(list(in_channels), channels, extra)
        self.channels, self.levels = channels, len(in_channels) + (1 if pooled else coarse)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels `(B, channels, H_l, W_l)`, fine ones first."""
        return list(self.fpn(OrderedDict((str(k), x) for k, x in enumerate(maps))).values())
