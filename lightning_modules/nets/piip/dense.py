"""A pyramid as backbone of dense tasks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from penstock.lightning_modules.nets.map_backbone import MapBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.merging import SimpleFpn, conv_merge
from penstock.lightning_modules.nets.piip.pyramid import Branch, Pyramid, Unit

Colour = tuple[float, ...]
HALVES: Colour = (0.5,)


class MergedPyramid(MapBackbone):
    """What backbones of dense tasks share: images `(B, C, H, W)` in [-1, 1] to four maps.

    Args:
        branches: See `Pyramid`.
        unit: Likewise.
        mean: Of values in [0, 1], one or of each channel: what images are normalised by; a half leaves them in [-1, 1].
        std: Likewise.

    Attributes:
        channels: Of the maps.
        strides: Of the maps.
        weights: Where those of the branches are.

    Raises:
        UserError: as `Pyramid`.
    """

    def __init__(self, branches: Sequence[Branch], unit: Unit | None, mean: Colour, std: Colour):
        super().__init__()
        self.pyramid = Pyramid(branches, unit)
        self.weights = ", ".join(branch.weights for branch in branches)
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    @property
    def about(self) -> str:
        return f"a pyramid of {len(self.pyramid.branches)} branches"

    def load(self) -> None:
        """Pretrained weights of the branches.

        Raises:
            UserError: as the branches.
        """
        self.pyramid.load()

    def normalised(self, image: Tensor) -> Tensor:
        """Images as the branches see them."""
        return torch.addcmul((0.5 - self.mean) / self.std, image, 0.5 / self.std)


class PiipBackbone(MergedPyramid):
    """All branches merged on the finest grid, and maps of cells a quarter, half, as large and twice as large.

    Args:
        branches: See `Pyramid`; with patches of 16 pixels maps are of strides 4, 8, 16 and 32.
        unit: Likewise.
        mean: See `MergedPyramid`.
        std: Likewise.
        maps: 4, or 3 without the finest.

    Raises:
        UserError: as `Pyramid`.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        unit: Unit | None = InteractionUnit,
        mean: Colour = HALVES,
        std: Colour = HALVES,
        maps: Literal[3, 4] = 4,
    ):
        super().__init__(branches, unit, mean, std)
        dims = [branch.dims[-1] for branch in branches]
        self.merge, self.fpn = conv_merge(dims), SimpleFpn(dims[0], maps)
        self.channels, stride = [dims[0]] * maps, branches[-1].strides[-1]
        self.strides = [stride // 4, stride // 2, stride, 2 * stride][-maps:]

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.fpn(self.merge(self.pyramid(self.normalised(image))[0]))
