"""Attention of one map's tokens to another's: deformable (arXiv 2010.04159 eq. 2, one level) or dense."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels.deformable_attention import deformable_attention
from penstock.lightning_modules.errors import UserError

Grid = tuple[int, int]


def centers(grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Middles of the cells of a grid (H, W), row by row, `(H W, 2)`, (x, y) in [0, 1]."""
    y, x = ((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in grid)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def directions(heads: int, points: int) -> Tensor:
    """Where the points of heads start, `(heads, points, 2)`, (x, y) in cells: on square rings of side 2 (p + 1)."""
    angle = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
    around = torch.stack([angle.cos(), angle.sin()], -1)
    around = around / around.abs().amax(-1, keepdim=True)
    return around[:, None] * torch.arange(1, points + 1)[None, :, None]


class DeformableAttention(nn.Module):
    """Each query cell reads the other map at a few points that it chooses around its own place.

    Args:
        dim: Of the queries and of the result.
        feat_dim: Of the other map's tokens.
        heads: M, divides `dim * value_ratio`.
        points: P of each head.
        value_ratio: Width of what is read, of `dim`.

    Raises:
        UserError: heads that do not divide the width.
    """

    def __init__(self, dim: int, feat_dim: int, heads: int = 16, points: int = 4, value_ratio: float = 0.5):
        super().__init__()
        width = int(dim * value_ratio)
        if width % heads:
            raise UserError(
                f"heads: found {heads}, expected a divisor of {width}, the width of values of {dim} channels"
            )
        self.heads, self.points = heads, points
        self.sampling_offsets = nn.Linear(dim, heads * points * 2)
        self.attention_weights = nn.Linear(dim, heads * points)
        self.value_proj = nn.Linear(feat_dim, width)
        self.output_proj = nn.Linear(width, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points on rings around each cell, equal weights."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(directions(self.heads, self.points).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, grid: Grid, feat: Tensor, feat_grid: Grid) -> Tensor:
        """Tokens `(B, H W, dim)` from those of `grid`, and from those `(B, H_f W_f, feat_dim)` of `feat_grid`.

        Places and weights are float32 at least, whatever the precision of training.
        """
        batch, count, _ = query.shape
        with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
            wide = query.to(torch.promote_types(query.dtype, torch.float32))
            shape = batch, count, self.heads, 1, self.points
            dx, dy = self.sampling_offsets(wide).view(*shape, 2).unbind(-1)
            offsets = torch.stack([dx / feat_grid[1], dy / feat_grid[0]], -1)
            places = centers(grid, wide.device, wide.dtype)[None, :, None, None, None] + offsets
            weights = self.attention_weights(wide).view(*shape).softmax(-1)
        value = self.value_proj(feat).unflatten(2, (self.heads, -1))
        return self.output_proj(deformable_attention(value, [feat_grid], places, weights))


class DenseAttention(nn.Module):
    """Multi-head attention to all tokens of the other map.

    Args:
        dim: Of the queries and of the result.
        feat_dim: Of the other map's tokens.
        heads: Divides `dim`.

    Raises:
        UserError: heads that do not divide the width.
    """

    def __init__(self, dim: int, feat_dim: int, heads: int = 16):
        super().__init__()
        if dim % heads:
            raise UserError(f"heads: found {heads}, expected a divisor of the {dim} channels")
        self.heads = heads
        self.query_proj = nn.Linear(dim, dim, bias=False)
        self.key_proj = nn.Linear(feat_dim, dim, bias=False)
        self.value_proj = nn.Linear(feat_dim, dim, bias=False)
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, grid: Grid, feat: Tensor, feat_grid: Grid) -> Tensor:
        """Tokens as `DeformableAttention`'s; the grids do not matter."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query_proj, query), (self.key_proj, feat), (self.value_proj, feat))
        )
        return self.output_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
