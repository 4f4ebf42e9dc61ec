"""A timm ConvNeXt (arXiv 2201.03545) as a branch of a pyramid: groups of its blocks and downsampling layers."""

import re
from collections.abc import Sequence
from itertools import accumulate

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.interaction import State
from penstock.lightning_modules.nets.piip.timm_branch import bounds, created, load_all, pretrained

TINY = (3, 4, 2, *[1] * 8, 4)
"""Twelve groups of ConvNeXt-T, arXiv 2501.07783; as in the next ones, the first unit of a stage begins a group."""
BASE = (3, 4, 4, *[3] * 8, 4)
"""Twelve groups of ConvNeXt-S, B and L."""
GROUPS = {sum(groups): groups for groups in (TINY, BASE)}

OF_TRANSFORMERS = [
    (r"^convnext\.", ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^layernorm\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
]


def timm_name(name: str) -> str:
    """timm's name of a tensor of transformers' ConvNeXt; timm's own stay."""
    for pattern, replacement in OF_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


class ConvNextBranch(nn.Module):
    """Maps of a timm `ConvNeXt` as tokens, row by row; its units in groups between which branches interact.

    Units are the blocks of all stages and, before those of a stage that has one, its downsampling layer.

    Args:
        model: timm model name, or `hf-hub:<owner>/<name>`.
        size: Side of its images, pixels, at the pyramid's nominal size.
        groups: Numbers of units in each group; a number is that many groups of equal length. None is the paper's
            twelve of models of 21 or 39 units.
        weights: `hub`, a file of timm's or of transformers' state dict of the model, or `random`.
        drop_path: Probability that an image skips the last block in training, linear from 0 at the first.
        in_chans: Channels of images.
        depths: Numbers of blocks in the four stages; None as the model has them, as of the following.
        embed_dims: Channels of the stages.

    Attributes:
        depth: Number of blocks.
        dims: Channels of the tokens after each group.
        strides: Pixels of a cell after each group.

    Raises:
        UserError: no such model, groups that do not hold all units, or images smaller than a last cell.
    """

    def __init__(
        self,
        model: str,
        size: int,
        groups: int | Sequence[int] | None = None,
        weights: str = "hub",
        drop_path: float = 0.0,
        in_chans: int = 3,
        depths: Sequence[int] | None = None,
        embed_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        shape = {"depths": depths, "dims": embed_dims}
        own = {name: tuple(value) for name, value in shape.items() if value is not None}
        net = created(model, ConvNeXt, num_classes=0, in_chans=in_chans, drop_path_rate=drop_path, **own)
        stride = net.feature_info[-1]["reduction"]
        if size < stride:
            raise UserError(f"size: found {size}, expected {stride} or more, the stride of {model}")
        self.model, self.size, self.weights = model, size, weights
        self.stem, self.stages = net.stem, net.stages
        counts = [len(_units(stage)) for stage in self.stages]
        self.depth = sum(len(stage.blocks) for stage in self.stages)
        if groups is None and sum(counts) not in GROUPS:
            raise UserError(
                f"groups: found none for the {sum(counts)} units of {model}, expected numbers of units; "
                f"there are some for {' and '.join(map(str, GROUPS))} units"
            )
        self.bounds = bounds(GROUPS[sum(counts)] if groups is None else groups, sum(counts), model, "unit")
        ends = list(accumulate(counts))
        last = [next(i for i, end in enumerate(ends) if stop <= end) for _, stop in self.bounds]
        self.dims = [net.feature_info[i]["num_chs"] for i in last]
        self.strides = [net.feature_info[i]["reduction"] for i in last]

    def load(self) -> None:
        """Pretrained weights; random ones stay.

        Raises:
            UserError: no weights, or those of another model.
        """
        if self.weights != "random":
            self.load_pretrained(pretrained(self.model, self.weights))

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Loads a state dict of the same model, of timm's or transformers' names.

        Raises:
            UserError: weights of another model.
        """
        load_all(self, {timm_name(name): value for name, value in state.items()}, self.model)

    def embed(self, image: Tensor) -> State:
        """Images `(B, C, h, w)` as tokens; rows and columns that fill no cell are left out, here and later."""
        return tokens_of(self.stem(image))

    def run(self, group: int, state: State) -> State:
        """The state after a group of units."""
        x = state.tokens.transpose(1, 2).unflatten(2, state.grid)
        units = [unit for stage in self.stages for unit in _units(stage)]
        for unit in units[slice(*self.bounds[group])]:
            x = unit(x)
        return tokens_of(x)

    def attention_operations(self, image_size: tuple[int, int]) -> int:
        """None: it has no attention."""
        return 0


def _units(stage: nn.Module) -> list[nn.Module]:
    first = [] if isinstance(stage.downsample, nn.Identity) else [stage.downsample]
    return [*first, *stage.blocks]


def tokens_of(x: Tensor) -> State:
    """A map `(B, D, H, W)` as tokens, row by row."""
    return State(x.flatten(2).transpose(1, 2), tuple(x.shape[2:]))
