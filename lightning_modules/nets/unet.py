"""The default network: a compact U-Net with adaptive group normalisation, conditioned on classes or text."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.nets.condition import (
    Condition,
    CrossAttention,
    TimeEmbedding,
    attend,
    check_image_shape,
    check_input,
)


def zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """`layer` with weights and biases set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Group normalisation with groups of at least 4 channels, at most 32 groups."""
    return nn.GroupNorm(min(channels // 4, 32), channels, affine=affine)


class ResidualBlock(nn.Module):
    """x + f(x, emb) with adaptive group normalisation GN(h) (1 + a) + b, a and b linear in emb (arXiv 2105.05233).

    The last convolution starts at zero, so that a new block is the identity (or its 1x1 shortcut).

    Args:
        inputs: channels of the input, a multiple of 4.
        outputs: channels of the output, a multiple of 4.
        embedding: size of the embedding.
        dropout: probability in [0, 1).
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float = 0.0):
        super().__init__()
        self.norm0 = group_norm(inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = zero(nn.Linear(embedding, 2 * outputs))
        self.norm1 = group_norm(outputs, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`(B, inputs, H, W)` and the activated embedding `(B, embedding)` to `(B, outputs, H, W)`."""
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), 1 + scale))
        return self.shortcut(x) + self.conv1(self.dropout(h))


class AttentionBlock(nn.Module):
    """x + attention over all pixels, then over the text tokens where there is a text; both start at zero.

    Args:
        channels: channels of input and output, a multiple of 4.
        text_dim: size of a text token; 0 = no text.
        head_dim: size of a head, if `channels` is a multiple of it; otherwise there is one head.
    """

    def __init__(self, channels: int, text_dim: int = 0, head_dim: int = 64):
        super().__init__()
        self.heads = channels // head_dim if channels % head_dim == 0 else 1
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))
        if text_dim:
            self.text_norm = nn.LayerNorm(channels)
            self.text = CrossAttention(channels, text_dim, self.heads)

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        """`(B, C, H, W)` and text `(B, L, text_dim)` or None to `(B, C, H, W)`."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        tokens = x.flatten(2).transpose(1, 2) + self.out(attend(*self.qkv(tokens).chunk(3, dim=-1), self.heads))
        if text is not None:
            tokens = tokens + self.text(self.text_norm(tokens), text)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class UNet(nn.Module):
    """U-Net velocity field (arXiv 2006.11239 appendix B; adaptive normalisation of arXiv 2105.05233).

    Residual blocks going down and as many going up, joined by concatenation; 2x2 means and nearest neighbours between
    the levels; two blocks, with attention between them, in the middle. The output layer starts at zero. The defaults
    are sized for 8x8 images on a CPU: 0.3 M parameters, 4 GFLOP for a training step of batch 128.

    Args:
        shape: (C, H, W) of a sample; H and W multiples of 2^(levels - 1).
        width: channels of the first level, a multiple of 4.
        mult: channels of each level in units of `width`.
        blocks: residual blocks of a level, each way.
        attention: heights at which attention follows the residual blocks; the middle always has it.
        num_classes: 0 = no classes.
        text_dim: size of a text token; 0 = no text.
        dropout: in the residual blocks.
    """

    checkpoint_blocks = (ResidualBlock, AttentionBlock)

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 8, 8),
        width: int = 24,
        mult: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        num_classes: int = 0,
        text_dim: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        shape, mult = tuple(shape), tuple(mult)
        check_image_shape(shape, 2 ** (len(mult) - 1), f"{len(mult)} levels")
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        heights = [shape[1] >> level for level in range(len(mult))]
        if set(attention) - set(heights):
            raise ValueError(
                f"attention must name heights among {heights}, got {sorted(set(attention) - set(heights))}"
            )
        self.shape, self.num_classes = shape, num_classes
        emb = 4 * width
        widths = [width * factor for factor in mult]
        self.time = TimeEmbedding(width, emb)
        self.condition = Condition(emb, num_classes, text_dim)
        self.stem = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, channels = [], width
        for height, outputs in zip(heights, widths):
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(_Step(channels, outputs, emb, dropout, height in attention, text_dim))
                channels = outputs
                skips.append(channels)
            self.down.append(level)
        self.middle = nn.ModuleList([
            _Step(channels, channels, emb, dropout, True, text_dim),
            _Step(channels, channels, emb, dropout, False, text_dim),
        ])  # fmt: skip
        for height, outputs in zip(reversed(heights), reversed(widths)):
            level = nn.ModuleList()
            for _ in range(blocks):
                level.append(_Step(channels + skips.pop(), outputs, emb, dropout, height in attention, text_dim))
                channels = outputs
            self.up.append(level)
        self.norm = group_norm(channels)
        self.head = zero(nn.Conv2d(channels, shape[0], 3, padding=1))

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
        h, skips = self.stem(x), []
        for depth, level in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if depth else h
            for step in level:
                h = step(h, emb, text)
                skips.append(h)
        for step in self.middle:
            h = step(h, emb, text)
        for depth, level in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if depth else h
            for step in level:
                h = step(torch.cat([h, skips.pop()], dim=1), emb, text)
        return self.head(F.silu(self.norm(h)))


class _Step(nn.Module):
    """A residual block and, where asked for, attention after it."""

    def __init__(self, inputs: int, outputs: int, emb: int, dropout: float, attention: bool, text_dim: int):
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, emb, dropout)
        self.attention = AttentionBlock(outputs, text_dim) if attention else None

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        h = self.block(x, emb)
        return h if self.attention is None else self.attention(h, text)
