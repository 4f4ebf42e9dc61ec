"""A timm vision transformer as a branch of a pyramid: groups of blocks, resized positions, windows."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.piip.interaction import State
from penstock.lightning_modules.nets.piip.resizing import resized_kernel, resized_table
from penstock.lightning_modules.nets.piip.window_attention import Pad, attend
from penstock.lightning_modules.timm_weights import complaint, read_weights


class VitBranch(nn.Module):
    """Tokens of patches of a timm `VisionTransformer`, its blocks in groups between which branches interact.

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

    Attributes:
        dims: Channels of the tokens after each group.
        strides: Pixels of a cell after each group.

    Raises:
        UserError: no such model, groups that do not hold all blocks, a size that patches do not divide, other weights.
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
        drop_path_rule: Literal["constant", "linear"] = "constant",
        layer_scale: float | None = 1.0,
        patch: int = 16,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
    ):
        super().__init__()
        if size % patch:
            near = round(size / patch) * patch or patch
            raise UserError(f"size: found {size}, expected a multiple of the patch of {patch} pixels, such as {near}")
        shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        if embed_dim and num_heads and embed_dim % num_heads:
            raise UserError(f"num_heads: found {num_heads}, expected a divisor of embed_dim {embed_dim}")
        self.model, self.size, self.weights, self.patch = model, size, weights, patch
        own = {name: value for name, value in shape.items() if value is not None}
        if layer_scale is not None:
            own["init_values"] = layer_scale
        net = _created(model, num_classes=num_classes, class_token=class_token, in_chans=in_chans, **own)
        self.patch_embed = nn.Conv2d(in_chans, net.embed_dim, patch, patch)
        self.cls_token, self.norm_pre = net.cls_token, net.norm_pre
        side = (size if resize_table else net.patch_embed.img_size[0]) // patch
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, net.embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks, self.norm, self.head = net.blocks, *((net.norm, net.head) if num_classes else (None, None))
        self.bounds = list(pairwise(_bounds(groups, len(self.blocks), model)))
        self.windows = [None if k in global_blocks else window for k in range(len(self.blocks))]
        self.pad: Pad = pad
        _set_drop_path(self.blocks, drop_path, drop_path_rule)
        self.dims, self.strides = [net.embed_dim] * len(self.bounds), [patch] * len(self.bounds)

    def load(self) -> None:
        """Pretrained weights, positions and patches resized; random ones stay.

        Raises:
            UserError: no weights, or those of another model.
        """
        if self.weights == "random":
            return
        if self.weights == "hub":
            state = timm.create_model(self.model, pretrained=True).state_dict()
        else:
            state = read_weights(self.weights, "weights", self.model)
        self.load_pretrained(state)

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
            kernel, table = state["patch_embed.weight"], state["pos_embed"]
            first = table.shape[1] - math.isqrt(table.shape[1]) ** 2
            if first and "cls_token" in state:
                state["cls_token"] = state["cls_token"] + table[:, :1]
            side = math.isqrt(self.pos_embed.shape[1])
            state["pos_embed"] = resized_table(table[:, first:], (side, side))
            state["patch_embed.weight"] = resized_kernel(kernel, self.patch)
            kept = {k: v for k, v in own.items() if k.endswith(("ls1.gamma", "ls2.gamma"))}
            if "head.weight" in own and own["head.weight"].shape != state.get("head.weight", kernel).shape:
                kept |= {k: v for k, v in own.items() if k.startswith("head.")}
                state = {k: v for k, v in state.items() if not k.startswith("head.")}
            self.load_state_dict(kept | {k: v for k, v in state.items() if k in own})
        except KeyError as error:
            raise UserError(f"weights: {error} is missing; expected the state dict of {self.model}") from error
        except RuntimeError as error:
            raise UserError(f"weights: do not fit {self.model}: {complaint(error)}") from error

    def embed(self, image: Tensor) -> State:
        """Images `(B, C, h, w)` as tokens, h and w multiples of the patch."""
        x = self.patch_embed(image)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + resized_table(self.pos_embed, grid)
        cls = None if self.cls_token is None else self.norm_pre(self.cls_token).expand(len(x), -1, -1)
        return State(self.norm_pre(x), grid, cls)

    def run(self, group: int, state: State) -> State:
        """The state after a group of blocks."""
        x = state.tokens if state.cls is None else torch.cat([state.cls, state.tokens], 1)
        for k in range(*self.bounds[group]):
            x = self._block(k, x, state.grid)
        cls, tokens = (None, x) if state.cls is None else (x[:, :1], x[:, 1:])
        return State(tokens, state.grid, cls)

    def attention_operations(self, image_size: tuple[int, int]) -> int:
        """Multiplications of its attentions' products in an image of (height, width), of the cells without padding."""
        n, dim = (image_size[0] // self.patch) * (image_size[1] // self.patch), self.dims[-1]
        return sum(2 * n * (n if window is None else window**2) * dim for window in self.windows)

    def _block(self, k: int, x: Tensor, grid: tuple[int, int]) -> Tensor:
        block, window = self.blocks[k], self.windows[k]
        if window is None:
            return block(x)
        x = x + block.drop_path1(block.ls1(attend(block.attn, block.norm1(x), grid, window, self.pad)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _created(model: str, **shape: Any) -> VisionTransformer:
    """A timm model.

    Raises:
        UserError: no such model, or one of another kind.
    """
    if not model.startswith("hf-hub:") and not timm.is_model(model):
        raise UserError(f"model: timm has no '{model}'{did_you_mean(model, timm.list_models())}")
    try:
        net = timm.create_model(model, global_pool="token" if shape["class_token"] else "avg", fc_norm=False, **shape)
    except TypeError as error:
        raise UserError(f"model: {model} is none of timm's VisionTransformers ({error})") from error
    if not isinstance(net, VisionTransformer):
        raise UserError(f"model: {model} is a {type(net).__name__}, expected one of timm's VisionTransformers")
    return net


def _bounds(groups: int | Sequence[int], depth: int, model: str) -> list[int]:
    """First block of each group, and the depth.

    Raises:
        UserError: groups that do not hold all blocks, or are empty.
    """
    if isinstance(groups, int):
        if groups < 1 or depth % groups:
            raise UserError(f"groups: found {groups}, expected a divisor of the {depth} blocks of {model}, or a list")
        groups = [depth // groups] * groups
    if min(groups, default=0) < 1:
        raise UserError(f"groups: found {list(groups)}, expected at least one block in each")
    if sum(groups) != depth:
        raise UserError(f"groups: found {list(groups)} of {sum(groups)} blocks, expected all {depth} of {model}")
    return [0, *accumulate(groups)]


def _set_drop_path(blocks: nn.Sequential, rate: float, rule: str) -> None:
    for k, block in enumerate(blocks):
        own = rate if rule == "constant" else rate * k / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(own), DropPath(own)


def _own_name(name: str) -> str:
    """A name of this module, of timm's or of DeiT's code."""
    name = name.replace("patch_embed.proj.", "patch_embed.")
    return name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
