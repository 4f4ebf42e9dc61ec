"""A timm vision transformer as a branch of a pyramid: groups of blocks, resized positions, windows."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.interaction import State
from penstock.lightning_modules.nets.piip.resizing import resized_kernel, resized_table
from penstock.lightning_modules.nets.piip.timm_branch import bounds, created, load_all, pretrained
from penstock.lightning_modules.nets.piip.window_attention import Pad, WindowBlock

Rule = Literal["constant", "linear"]


class TransformerBranch(nn.Module):
    """Tokens of patches of a timm `VisionTransformer`, its blocks in groups between which branches interact.

    Args:
        net: The transformer, with class token, table of positions and classifier or without.
        model: Its name.
        size: See `VitBranch`, as of all others.
        groups: Likewise.
        weights: Likewise.
        resize_table: Likewise.
        window: Likewise.
        global_blocks: Likewise.
        pad: Likewise.
        drop_path: Likewise.
        drop_path_rule: Likewise.
        patch: Likewise.

    Attributes:
        depth: Number of blocks.
        dims: Channels of the tokens after each group.
        strides: Pixels of a cell after each group.
        checkpoint_blocks: Class of the blocks.

    Raises:
        UserError: groups that do not hold all blocks, or a size that patches do not divide.
    """

    checkpoint_blocks = (Block,)

    def __init__(
        self,
        net: VisionTransformer,
        model: str,
        size: int,
        groups: int | Sequence[int] = 12,
        weights: str = "hub",
        resize_table: bool = False,
        window: int | None = None,
        global_blocks: Sequence[int] = (),
        pad: Pad = "projections",
        drop_path: float = 0.0,
        drop_path_rule: Rule = "constant",
        patch: int = 16,
    ):
        super().__init__()
        if size % patch:
            near = round(size / patch) * patch or patch
            raise UserError(f"size: found {size}, expected a multiple of the patch of {patch} pixels, such as {near}")
        self.model, self.size, self.weights, self.patch = model, size, weights, patch
        self.patch_embed = nn.Conv2d(net.in_chans, net.embed_dim, patch, patch)
        self.cls_token, self.norm_pre, self.pos_embed = net.cls_token, net.norm_pre, None
        if net.pos_embed is not None:
            side = (size if resize_table else net.patch_embed.img_size[0]) // patch
            self.pos_embed = nn.Parameter(torch.empty(1, side * side, net.embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks, self.norm, self.head = net.blocks, *((net.norm, net.head) if net.num_classes else (None, None))
        self.bounds = bounds(groups, len(self.blocks), model)
        self.windows = [None if k in global_blocks else window for k in range(len(self.blocks))]
        self.pad: Pad = pad
        for block, own in zip(self.blocks, self.windows):
            if own is not None:
                block.__class__ = WindowBlock
        _set_drop_path(self.blocks, drop_path, drop_path_rule)
        self.depth = len(self.blocks)
        self.dims, self.strides = [net.embed_dim] * len(self.bounds), [patch] * len(self.bounds)

    def load(self) -> None:
        """Pretrained weights, positions and patches resized; random ones stay.

        Raises:
            UserError: no weights, or those of another model.
        """
        if self.weights != "random":
            self.load_pretrained(pretrained(self.model, self.weights))

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Loads a state dict of the same model, whatever its grid and patch.

        The class token takes its position in; factors that a model does not have stay as they are, and so does a
        classifier of other classes.

        Raises:
            UserError: weights of another model.
        """
        state = {_own_name(name): value for name, value in state.items()}
        own = self.state_dict()
        try:
            kernel = state["patch_embed.weight"]
            state["patch_embed.weight"] = resized_kernel(kernel, self.patch)
            if self.pos_embed is not None:
                state |= self._positions(state["pos_embed"], state.get("cls_token"))
        except KeyError as error:
            raise UserError(f"weights: {error} is missing; expected the state dict of {self.model}") from error
        kept = {k: v for k, v in own.items() if k.endswith(("ls1.gamma", "ls2.gamma"))}
        if "head.weight" in own and own["head.weight"].shape != state.get("head.weight", kernel).shape:
            kept |= {k: v for k, v in own.items() if k.startswith("head.")}
            state = {k: v for k, v in state.items() if not k.startswith("head.")}
        load_all(self, kept | state, self.model)

    def embed(self, image: Tensor) -> State:
        """Images `(B, C, h, w)` as tokens, h and w multiples of the patch."""
        x = self.patch_embed(image)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + resized_table(self.pos_embed, grid)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return self._state(self.norm_pre(x), grid)

    def run(self, group: int, state: State) -> State:
        """The state after a group of blocks."""
        x = state.tokens if state.cls is None else torch.cat([state.cls, state.tokens], 1)
        for k in range(*self.bounds[group]):
            x = self._block(k, x, state.grid)
        return self._state(x, state.grid)

    def _state(self, x: Tensor, grid: tuple[int, int]) -> State:
        return State(x, grid) if self.cls_token is None else State(x[:, 1:], grid, x[:, :1])

    def attention_operations(self, image_size: tuple[int, int]) -> int:
        """Multiplications of its attentions' products in an image of (height, width), of the cells without padding."""
        n, dim = (image_size[0] // self.patch) * (image_size[1] // self.patch), self.dims[-1]
        return sum(2 * n * (n if window is None else window**2) * dim for window in self.windows)

    def _positions(self, table: Tensor, cls_token: Tensor | None) -> dict[str, Tensor]:
        """The table of a checkpoint for this grid, and the class token with its own position."""
        first = table.shape[1] - math.isqrt(table.shape[1]) ** 2
        side = math.isqrt(self.pos_embed.shape[1])
        found = {"pos_embed": resized_table(table[:, first:], (side, side))}
        return found if not first or cls_token is None else found | {"cls_token": cls_token + table[:, :1]}

    def _block(self, k: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
        block, window = self.blocks[k], self.windows[k]
        return block(x) if window is None else block(x, grid, window, self.pad)


class VitBranch(TransformerBranch):
    """A timm `VisionTransformer` by its name.

    Args:
        model: timm model name, or `hf-hub:<owner>/<name>`.
        size: Side of its images, pixels, at the pyramid's nominal size.
        groups: Numbers of blocks in each group; a number is that many groups of equal length.
        weights: `hub`, a file of the model's state dict, or `random`.
        num_classes: Of its own classifier of final norm and linear layer; 0 without.
        class_token: Whether there is one, around the blocks only.
        resize_table: Whether the table of positions is that of `size` from the start; else it stays that of
            pretraining, and each image resizes it.
        window: Side of windows of attention, cells; none without.
        global_blocks: Numbers of blocks that see the whole grid all the same.
        pad: See `attend`.
        drop_path: Probability that an image skips a layer of a block in training.
        drop_path_rule: `constant` over the blocks, or `linear` from 0.
        layer_scale: Start of trained factors of each layer's channels; None as the model has them.
        patch: Side of patches, pixels; kernels of other sides are resized.
        in_chans: Channels of images.
        embed_dim: Of the tokens; None as the model has it, as of the following.
        depth: Number of blocks.
        num_heads: Of attention.
        mlp_ratio: Of hidden layers.

    Raises:
        UserError: as `TransformerBranch`; no such model, or heads that do not divide the tokens.
    """

    def __init__(
        self,
        model: str,
        size: int,
        groups: int | Sequence[int] = 12,
        weights: str = "hub",
        num_classes: int = 0,
        class_token: bool = False,
        resize_table: bool = False,
        window: int | None = None,
        global_blocks: Sequence[int] = (),
        pad: Pad = "projections",
        drop_path: float = 0.0,
        drop_path_rule: Rule = "constant",
        layer_scale: float | None = 1.0,
        patch: int = 16,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
    ):
        if embed_dim and num_heads and embed_dim % num_heads:
            raise UserError(f"num_heads: found {num_heads}, expected a divisor of embed_dim {embed_dim}")
        shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        net = created(
            model,
            VisionTransformer,
            num_classes=num_classes,
            class_token=class_token,
            global_pool="token" if class_token else "avg",
            fc_norm=False,
            in_chans=in_chans,
            **{name: value for name, value in {**shape, "init_values": layer_scale}.items() if value is not None},
        )
        super().__init__(
            net,
            model,
            size,
            groups,
            weights,
            resize_table,
            window,
            global_blocks,
            pad,
            drop_path,
            drop_path_rule,
            patch,
        )


def _set_drop_path(blocks: nn.Sequential, rate: float, rule: Rule) -> None:
    for k, block in enumerate(blocks):
        own = rate if rule == "constant" else rate * k / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(own), DropPath(own)


def _own_name(name: str) -> str:
    """A name of this module, of timm's or of DeiT's code."""
    name = name.replace("patch_embed.proj.", "patch_embed.")
    return name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
