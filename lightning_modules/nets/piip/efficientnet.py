"""timm's EfficientNets and MobileNets of inverted residuals (arXiv 1801.04381, 1905.11946) as branches of a pyramid."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.convnext import tokens_of
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit, State
from penstock.lightning_modules.nets.piip.timm_branch import bounds, created, load_all, pretrained

SIDE = 64  # of an image that tells strides, pixels
HEADS = 4  # of interactions: widths of these models have few factors


class EfficientNetBranch(nn.Module):
    """Maps of the first stages of a timm `EfficientNet` as tokens, row by row; its blocks in groups.

    With `norm_eval` running statistics of norms do not move; else, as with random weights, those of what trains take
    the statistics of batches.

    Args:
        model: timm model name, such as `mobilenetv2_100`, or `hf-hub:<owner>/<name>`.
        size: Side of its images, pixels, at the pyramid's nominal size.
        stages: How many of its stages there are; the others are left out.
        groups: Numbers of blocks in each group, or how many groups of equal length.
        weights: `hub`, a file of the whole model's state dict, or `random`.
        frozen: How many stages do not train; with one the stem doesn't either.
        norm_eval: See above.
        pad_type: `same` for models with TensorFlow's padding; None is the model's own.

    Attributes:
        depth: Number of blocks.
        dims: Channels of the tokens after each group.
        strides: Pixels of a cell after each group.

    Raises:
        UserError: no such model, stages that it does not have, or groups that do not hold all blocks.
    """

    def __init__(
        self,
        model: str,
        size: int,
        stages: int,
        groups: int | Sequence[int],
        weights: str = "hub",
        frozen: int = 2,
        norm_eval: bool = True,
        pad_type: Literal["same"] | None = None,
    ):
        super().__init__()
        net = created(model, EfficientNet, num_classes=0, **({"pad_type": pad_type} if pad_type else {}))
        if not 1 <= stages <= len(net.blocks):
            raise UserError(f"stages: found {stages}, expected 1 to {len(net.blocks)} of {model}")
        if not 0 <= frozen <= stages:
            raise UserError(f"frozen: found {frozen}, expected 0 to {stages}, the stages of {model} that there are")
        self.model, self.size, self.weights, self.norm_eval = model, size, weights, norm_eval
        self.conv_stem, self.bn1, self.blocks = net.conv_stem, net.bn1, net.blocks[:stages]
        self.depth = sum(len(stage) for stage in self.blocks)
        self.bounds = bounds(groups, self.depth, f"{stages} stages of {model}")
        shapes = self._shapes()
        self.dims = [dim for dim, _ in shapes]
        self.strides = [stride for _, stride in shapes]
        for module in [self.conv_stem, self.bn1, *self.blocks[:frozen]] if frozen else []:
            module.requires_grad_(False)
        self.train()

    @torch.no_grad()
    def _shapes(self) -> list[tuple[int, int]]:
        """Channels and stride after each group."""
        self.eval()
        state, found = self.embed(self.conv_stem.weight.new_zeros(1, 3, SIDE, SIDE)), []
        for group in range(len(self.bounds)):
            state = self.run(group, state)
            found.append((state.tokens.shape[2], SIDE // state.grid[0]))
        return found

    def train(self, mode: bool = True) -> "EfficientNetBranch":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and (self.norm_eval or not module.weight.requires_grad):
                module.eval()
        return self

    def load(self) -> None:
        """Pretrained weights; random ones stay.

        Raises:
            UserError: no weights, or those of another model.
        """
        if self.weights != "random":
            load_all(self, pretrained(self.model, self.weights), self.model)

    def embed(self, image: Tensor) -> State:
        """Images `(B, 3, h, w)` as tokens."""
        return tokens_of(self.bn1(self.conv_stem(image)))

    def run(self, group: int, state: State) -> State:
        """The state after a group of blocks."""
        x = state.tokens.transpose(1, 2).unflatten(2, state.grid)
        blocks = [block for stage in self.blocks for block in stage]
        for block in blocks[slice(*self.bounds[group])]:
            x = block(x)
        return tokens_of(x)

    def attention_operations(self, image_size: tuple[int, int]) -> int:
        """None: it has no attention."""
        return 0


def efficientnet_backbone(
    model: str,
    sizes: Sequence[int],
    stages: Sequence[int],
    groups: Sequence[Sequence[int]],
    weights: str = "hub",
    frozen: int = 2,
    norm_eval: bool = True,
    pad_type: Literal["same"] | None = None,
    interactions: bool = True,
    drop_path: float = 0.0,
    maps: Literal[3, 4] = 3,
) -> PiipBackbone:
    """A pyramid of one model: most of its stages on the smallest image, fewer on larger ones.

    Args:
        model: See `EfficientNetBranch`.
        sizes: Sides of the branches' images, pixels, the smallest first.
        stages: How many each branch has.
        groups: Numbers of blocks in the groups of each.
        weights: See `EfficientNetBranch`.
        frozen: Likewise.
        norm_eval: Likewise.
        pad_type: Likewise.
        interactions: Whether there are any.
        drop_path: Of them.
        maps: See `PiipBackbone`.

    Raises:
        UserError: lists of different lengths, or as `EfficientNetBranch` and `PiipBackbone`.
    """
    if not len(sizes) == len(stages) == len(groups):
        raise UserError(
            f"sizes, stages, groups: found {len(sizes)}, {len(stages)} and {len(groups)} of them, expected one each "
            "for every branch"
        )
    branches = [
        EfficientNetBranch(model, size, count, numbers, weights, frozen, norm_eval, pad_type)
        for size, count, numbers in zip(sizes, stages, groups)
    ]
    unit = partial(InteractionUnit, heads=HEADS, drop_path=drop_path) if interactions else None
    return PiipBackbone(branches, unit, maps=maps)
