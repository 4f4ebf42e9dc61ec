"""Diffusion transformers with timm's building blocks."""

from typing import Literal

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.nets.condition import (
    Condition,
    CrossAttention,
    TimeEmbedding,
    check_image_shape,
    check_input,
)

SIZES: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def zero(layer: nn.Linear) -> nn.Linear:
    """`layer` with weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def grid_embedding(dim: int, height: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions `(1, height * width, dim)`, row by row; half the features belong to each axis.

    Frequencies 10000^(-i / (dim / 4)), i = 0 .. dim / 4 - 1, sines before cosines (arXiv 2111.06377, arXiv 2212.09748).
    """
    if dim % 4:
        raise ValueError(f"2-D positions need a size divisible by 4, got {dim}")
    frequencies = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    axes = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return torch.cat([f(axis) for axis in axes for f in (torch.sin, torch.cos)], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift with `(B, D)` shift and scale on `(B, N, D)` tokens."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero (arXiv 2212.09748 section 3.2): x + gate f(modulate(LN(x))), gate 0 at first.

    Args:
        dim: size of the tokens.
        heads: a divisor of `dim`.
        mlp_ratio: hidden size of the feed-forward part in units of `dim`.
        text_dim: size of a text token; 0 = no cross-attention.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, text_dim: int = 0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(dim, num_heads=heads, qkv_bias=True)
        self.text = CrossAttention(dim, text_dim, heads) if text_dim else None
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.modulation = zero(nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        """Tokens `(B, N, dim)`, activated embedding `(B, dim)`, text `(B, L, text_dim)` or None to `(B, N, dim)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        if text is not None:
            x = x + self.text(self.norm1(x), text)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Diffusion transformer (arXiv 2212.09748) as a velocity field: SiT (arXiv 2401.08740) without learned sigma.

    Patches, 2-D positions, adaLN-Zero blocks, and a linear layer back to pixels that starts at zero. Text acts through
    its mean in the modulation and through cross-attention in every block.

    Args:
        shape: (C, H, W) of a sample; H and W multiples of `patch`.
        patch: side of a patch in pixels.
        dim: size of the tokens, a multiple of 4.
        depth: number of blocks.
        heads: a divisor of `dim`.
        num_classes: 0 = no classes.
        text_dim: size of a text token; 0 = no text.
    """

    checkpoint_blocks = (DiTBlock,)

    def __init__(
        self,
        shape: tuple[int, int, int] = (4, 32, 32),
        patch: int = 2,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        num_classes: int = 0,
        text_dim: int = 0,
    ):
        super().__init__()
        shape = tuple(shape)
        check_image_shape(shape, patch, "the patch")
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.shape, self.num_classes, self.patch = shape, num_classes, patch
        channels, height, width = shape
        self.grid = (height // patch, width // patch)
        self.patches = PatchEmbed((height, width), patch, channels, dim)
        self.register_buffer("positions", grid_embedding(dim, *self.grid), persistent=False)
        self.time = TimeEmbedding(256, dim)
        self.condition = Condition(dim, num_classes, text_dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, text_dim=text_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = zero(nn.Linear(dim, 2 * dim))
        self.head = zero(nn.Linear(dim, patch * patch * channels))
        self._initialise()

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` with the null condition where `mask` `(B,)` is true."""
        return self.condition.drop(cond, mask)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity at x.

        Args:
            x: `(B, C, H, W)`.
            t: `(B,)` in [0, 1], 0 = noise.
            cond: int64 `(B,)` classes, float `(B, L, text_dim)` text, or None for the null condition.

        Returns:
            `(B, C, H, W)`.

        Raises:
            ValueError: shapes do not fit.
        """
        check_input(x, t, self.shape)
        emb = self.time(t)
        pooled, text = self.condition(cond, len(x))
        emb = F.silu(emb if pooled is None else emb + pooled)
        h = self.patches(x)
        h = h + self.positions.to(h.dtype)
        for block in self.blocks:
            h = block(h, emb, text)
        shift, scale = self.modulation(emb).chunk(2, dim=1)
        h = self.head(modulate(self.norm(h), shift, scale))
        h = h.unflatten(1, self.grid).unflatten(3, (self.patch, self.patch, self.shape[0]))
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def _initialise(self) -> None:
        for block in self.blocks:
            for layer in (block.attention.qkv, block.attention.proj, block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.patches.proj.weight.flatten(1))
        nn.init.zeros_(self.patches.proj.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)


def dit(
    size: Literal["S", "B", "L", "XL"] = "S",
    patch: Literal[2, 4, 8] = 2,
    shape: tuple[int, int, int] = (4, 32, 32),
    num_classes: int = 1000,
    text_dim: int = 0,
) -> DiT:
    """A published size of DiT / SiT (arXiv 2212.09748 table 1): DiT-XL/2 is `dit("XL", 2)`.

    Args:
        size: S, B, L or XL.
        patch: side of a patch.
        shape: (C, H, W); the published ones work on latents of 32x32 (256 px) or 64x64 (512 px).
        num_classes: 0 = no classes.
        text_dim: size of a text token; 0 = no text.

    Raises:
        ValueError: unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    dim, depth, heads = SIZES[size]
    return DiT(shape, patch, dim, depth, heads, num_classes, text_dim)
