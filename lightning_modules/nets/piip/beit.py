"""BEiT v2 (arXiv 2208.06366) as a branch of a pyramid: biases of relative positions inside windows."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.timm_branch import created
from penstock.lightning_modules.nets.piip.vit import TransformerBranch

TABLE = "relative_position_bias_table"


class BiasedAttention(nn.Module):
    """Multi-head attention in a window, `softmax(q k / sqrt(d) + b) v`, b by how far apart two cells are.

    Args:
        dim: Of the tokens.
        heads: Divides it.
        window: Side, cells.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.num_heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `(B, window^2, dim)`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = (
            y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in F.linear(x, self.qkv.weight, bias).chunk(3, 2)
        )
        bias = self.relative_position_bias_table[relative_positions(self.window, x.device)].permute(2, 0, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)).transpose(1, 2).flatten(2))


def relative_positions(window: int, device: torch.device | None = None) -> Tensor:
    """Which row of a table `((2 w - 1)^2, heads)` holds the bias of two cells, `(w^2, w^2)`, by query and key.

    Rows are by the difference of the places' rows, then of their columns, each from `1 - w` to `w - 1`.
    """
    cell = torch.arange(window * window, device=device)
    y, x = (place[:, None] - place[None] + window - 1 for place in (cell // window, cell % window))
    return y * (2 * window - 1) + x


def resized_biases(table: Tensor, window: int) -> Tensor:
    """A pretrained table for another window, `((2 w - 1)^2, heads)`; what it holds of a class token goes.

    Differences of places are taken to lie at geometric distances, whose sum fits the new window, and between them are
    cubic splines, as in the code of BEiT (github.com/microsoft/unilm).
    """
    table = table[: math.isqrt(len(table)) ** 2]
    side, wanted = math.isqrt(len(table)), 2 * window - 1
    if side == wanted:
        return table
    places = _geometric(side // 2, wanted // 2)
    at = np.arange(-(wanted // 2), wanted // 2 + 1).clip(places[0], places[-1])
    grid = table.double().numpy().reshape(side, side, -1)
    for axis in (0, 1):
        grid = CubicSpline(places, grid, axis=axis)(at)
    return torch.from_numpy(grid).flatten(0, 1).to(table.dtype)


def _geometric(count: int, end: int) -> np.ndarray:
    """`-x_n .. x_n` with `x_i = 1 + q + ... + q^(i - 1)`, q in [1.01, 1.5] such that `x_count` is at most `end`."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**count) / (1 - ratio) > end else (ratio, high)
    half = np.cumsum(ratio ** np.arange(count))
    return np.concatenate([-half[::-1], [0], half])


class BeitBranch(TransformerBranch):
    """A timm `Beit` with biases of relative positions, in windows; it has no class token.

    Args:
        model: timm model name, or `hf-hub:<owner>/<name>`.
        size: Side of its images, pixels, at the pyramid's nominal size.
        groups: Numbers of blocks in each group; a number is that many groups of equal length.
        weights: `hub`, a file of the model's state dict, or `random`.
        window: Side of windows of attention, cells, to which tables of biases are resized.
        drop_path: Probability that an image skips a layer of the last block in training, linear from 0 at the first.
        patch: Side of patches, pixels.
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
        window: int = 28,
        drop_path: float = 0.0,
        patch: int = 16,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
    ):
        if embed_dim and num_heads and embed_dim % num_heads:
            raise UserError(f"num_heads: found {num_heads}, expected a divisor of embed_dim {embed_dim}")
        shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        with torch.device("meta"):
            known = created(model, Beit, num_classes=0, **{k: v for k, v in shape.items() if v is not None})
        first = known.blocks[0]
        net = VisionTransformer(
            in_chans=in_chans,
            num_classes=0,
            global_pool="avg",
            embed_dim=known.embed_dim,
            depth=len(known.blocks),
            num_heads=first.attn.num_heads,
            mlp_ratio=mlp_ratio,
            init_values=first.init_values,
            class_token=False,
            pos_embed="none",
        )
        for block in net.blocks:
            block.attn = BiasedAttention(net.embed_dim, first.attn.num_heads, window)
        super().__init__(
            net,
            model,
            size,
            groups,
            weights,
            window=window,
            pad="inputs",
            drop_path=drop_path,
            drop_path_rule="linear",
            patch=patch,
        )
        self.window = window

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Loads a state dict of the same model, whatever its window and patch.

        Raises:
            UserError: weights of another model.
        """
        resized = {k: resized_biases(v, self.window) for k, v in state.items() if k.endswith(TABLE)}
        super().load_pretrained(state | resized)
