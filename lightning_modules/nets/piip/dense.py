"""A pyramid as backbone of dense tasks."""

from collections.abc import Sequence

from torch import Tensor, nn

from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.merging import SimpleFpn, conv_merge
from penstock.lightning_modules.nets.piip.pyramid import Branch, Pyramid, Unit


class PiipBackbone(nn.Module):
    """Images `(B, C, H, W)` to maps of strides 4, 8, 16 and 32.

    Args:
        branches: See `Pyramid`, of stride 16 at their ends.
        unit: Likewise.

    Attributes:
        channels: Of the maps.

    Raises:
        UserError: as `Pyramid`.
    """

    def __init__(self, branches: Sequence[Branch], unit: Unit | None = InteractionUnit):
        super().__init__()
        self.pyramid = Pyramid(branches, unit)
        dims = [branch.dims[-1] for branch in branches]
        self.merge, self.fpn = conv_merge(dims), SimpleFpn(dims[0])
        self.channels = [dims[0]] * 4

    def load(self) -> None:
        """Pretrained weights of the branches.

        Raises:
            UserError: as the branches.
        """
        self.pyramid.load()

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.fpn(self.merge(self.pyramid(image)[0]))
