"""A pyramid of ConvNeXts, or of these and vision transformers, as backbone of dense tasks."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.dense import HALVES, Colour, MergedPyramid
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.merging import Resampling, hybrid_merge
from penstock.lightning_modules.nets.piip.pyramid import Branch, Unit

STRIDES = [4, 8, 16, 32]


class PiipHybridBackbone(MergedPyramid):
    """Maps that are merged each after another interaction.

    Where the finest branch is a ConvNeXt its own strides are those of the maps; where it is a vision transformer of
    stride 16 the maps are resampled (arXiv 2501.07783).

    Args:
        branches: See `Pyramid`.
        after: Numbers of the interactions, from 0, after which the first three maps are merged; the fourth is after
            the last.
        unit: See `Pyramid`.
        mean: See `MergedPyramid`.
        std: Likewise.

    Attributes:
        channels: Of the maps: those of the coarsest branch where they are merged.

    Raises:
        UserError: as `Pyramid`, numbers that do not rise or are of no interaction, or cells of other strides there.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        after: Sequence[int] = (0, 1, 10),
        unit: Unit | None = InteractionUnit,
        mean: Colour = HALVES,
        std: Colour = HALVES,
    ):
        super().__init__(branches, unit, mean, std)
        last, finest = len(branches[0].dims) - 1, branches[-1]
        self.after = [*after, last]
        if self.after[0] < 0 or any(a >= b for a, b in pairwise(self.after)):
            raise UserError(f"after: found {list(after)}, expected rising numbers from 0 to {last - 1}")
        strides = [finest.strides[k] for k in self.after]
        if strides not in (STRIDES, [16] * 4):
            raise UserError(
                f"after: found {list(after)}, where cells of the finest branch have {strides[:-1]} pixels, and at "
                f"last {strides[-1]}; expected {STRIDES} or four times 16{_nearest(finest.strides)}"
            )
        self.strides = STRIDES
        widths = [[branch.dims[k] for branch in branches] for k in self.after]
        self.channels = [dims[0] for dims in widths]
        *first, final = (hybrid_merge(dims) for dims in widths)
        self.merges = nn.ModuleDict({str(k): merge for k, merge in zip(after, first)})
        self.merge = final
        self.fpn = Resampling(*self.channels[:2]) if strides[0] == 16 else None

    def forward(self, image: Tensor) -> list[Tensor]:
        merges = [*self.merges.values(), self.merge]
        maps = [merge(states) for merge, states in zip(merges, self.pyramid(self.normalised(image), self.after))]
        return maps if self.fpn is None else self.fpn(maps)


def _nearest(strides: list[int]) -> str:
    """Numbers that fit a branch, if there are any."""
    ends = [k for k, (a, b) in enumerate(pairwise(strides)) if a != b]
    if [*(strides[k] for k in ends), strides[-1]] == STRIDES:
        return f", such as after {ends}"
    return ", such as after [0, 1, 2]" if set(strides) == {16} and len(strides) > 3 else ""
