"""The pyramid itself: branches on images of their own sizes, and interactions between groups of their blocks."""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.interaction import Interaction, InteractionUnit, State
from penstock.lightning_modules.nets.piip.resizing import resized_image

LARGER = 1.5  # times the parameters, from which on a model is larger; ConvNeXt-T has 1.3 times those of ViT-S
Unit = Callable[[int, int], InteractionUnit]


class Branch(Protocol):
    """What a pyramid asks of a branch, an `nn.Module`.

    Attributes:
        size: Side of its images at the pyramid's nominal size, pixels.
        weights: Where its pretrained weights are.
        depth: Number of its blocks.
        dims: Channels after each group of blocks.
        strides: Pixels of a cell after each group.
    """

    size: int
    weights: str
    depth: int
    dims: list[int]
    strides: list[int]

    def load(self) -> None:
        """Loads pretrained weights."""

    def embed(self, image: Tensor) -> State:
        """Images `(B, C, h, w)` as tokens."""

    def run(self, group: int, state: State) -> State:
        """The state after a group of blocks."""

    def attention_operations(self, image_size: tuple[int, int]) -> int:
        """Multiplications of its attentions' products in an image of (height, width)."""


class Pyramid(nn.Module):
    """PIIP: the largest model sees the smallest image.

    Args:
        branches: The one with the smallest image first, all of as many groups.
        unit: Makes an interaction unit of the channels of two neighbours, the coarser one's first; None leaves the
            branches alone, as gates of zero do.
        size: Side of the pyramid's images at its nominal size, pixels; None is the finest branch's.

    Attributes:
        size: See above.

    Raises:
        UserError: no branch, numbers of groups that differ, sizes that fall, or a nominal one below them.
    """

    def __init__(self, branches: Sequence[Branch], unit: Unit | None = InteractionUnit, size: int | None = None):
        super().__init__()
        groups = [len(branch.dims) for branch in branches]
        if not groups or len(set(groups)) > 1:
            raise UserError(f"branches: found {groups} groups of blocks, expected as many in each")
        sizes = [branch.size for branch in branches]
        if sizes != sorted(sizes):
            raise UserError(f"branches: found sizes {sizes}, expected {sorted(sizes)}, the smallest image first")
        self.size = sizes[-1] if size is None else size
        if self.size < sizes[-1]:
            raise UserError(f"size: found {size}, expected at least {sizes[-1]}, the finest branch's")
        counts = [sum(parameter.numel() for parameter in branch.parameters()) / 1e6 for branch in branches]
        if any(fine > LARGER * coarse for coarse, fine in combinations(counts, 2)):
            found, inverted = (", ".join(f"{n:.3g}" for n in row) for row in (counts, sorted(counts, reverse=True)))
            rank_zero_warn(
                f"branches: models of {found} million parameters on images of {', '.join(map(str, sizes))} pixels; a "
                f"parameter-inverted pyramid has the largest model on the smallest image: {inverted}"
            )
        self.branches = nn.ModuleList(branches)
        self.interactions = nn.ModuleList(
            Interaction([unit(a.dims[k], b.dims[k]) for a, b in pairwise(branches)] if unit else [])
            for k in range(groups[0])
        )

    def load(self) -> None:
        """Pretrained weights of all branches.

        Raises:
            UserError: as the branches.
        """
        for branch in self.branches:
            branch.load()

    def forward(self, image: Tensor, after: Sequence[int] = (-1,)) -> list[list[State]]:
        """States of all branches, the coarsest first, after each of some interactions.

        Args:
            image: `(B, C, H, W)`.
            after: Numbers of the interactions; -1 is the last.
        """
        last = len(self.interactions)
        wanted = [k % last for k in after]
        states = [branch.embed(resized_image(image, branch.size / self.size)) for branch in self.branches]
        kept = {}
        for k, interaction in enumerate(self.interactions):
            states = interaction([branch.run(k, state) for branch, state in zip(self.branches, states)])
            if k in wanted:
                kept[k] = states
        return [kept[k] for k in wanted]
