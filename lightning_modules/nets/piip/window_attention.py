"""A timm block's attention inside windows of a grid, as PIIP's dense models use it."""

from typing import Literal

from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]
Pad = Literal["inputs", "projections"]


def attend(attn: nn.Module, x: Tensor, grid: Grid, window: int | None, pad: Pad = "projections") -> Tensor:
    """Attention of tokens in windows; the last row and column of windows are filled up, and what fills is attended to.

    Args:
        attn: timm's `Attention`.
        x: `(B, H W, D)`.
        grid: (H, W).
        window: Side of a window, cells; None is the whole grid.
        pad: What is zero where there is no cell: queries, keys and values (`projections`), or what these are made of
            (`inputs`), as InternViT's code has it.
    """
    if window is None:
        return attn(x)
    if pad == "inputs":
        return _joined(attn(_windows(x, grid, window)), grid, window)
    q, k, v = (
        y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for y in _windows(attn.qkv(x), grid, window).chunk(3, 2)
    )
    drop = attn.attn_drop.p if attn.training else 0.0
    y = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, dropout_p=drop)
    return attn.proj_drop(attn.proj(_joined(y.transpose(1, 2).flatten(2), grid, window)))


def _windows(x: Tensor, grid: Grid, window: int) -> Tensor:
    """`(B H W, D)` to `(B windows, window^2, D)`."""
    (height, width), dim = grid, x.shape[2]
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, -width % window, 0, -height % window))
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)
    return x.reshape(-1, window * window, dim)


def _joined(x: Tensor, grid: Grid, window: int) -> Tensor:
    """The inverse of `_windows`."""
    rows, columns = (-(-n // window) for n in grid)
    x = x.reshape(-1, rows, columns, window, window, x.shape[2]).transpose(2, 3)
    x = x.reshape(x.shape[0], rows * window, columns * window, -1)
    return x[:, : grid[0], : grid[1]].flatten(1, 2)


class WindowBlock(Block):
    """timm's block whose attention sees windows of a grid; what a `Block` becomes, its parts and their names stay."""

    def forward(self, x: Tensor, grid: Grid, window: int, pad: Pad) -> Tensor:
        """Tokens after the block; arguments as `attend`'s."""
        x = x + self.drop_path1(self.ls1(attend(self.attn, self.norm1(x), grid, window, pad)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
