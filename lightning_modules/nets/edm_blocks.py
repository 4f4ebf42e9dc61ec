"""The residual block of both networks of EDM (arXiv 2206.00364 appendix F.4), under its official names."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Style:
    """What the blocks of the two networks differ in.

    Args:
        taps: FIR filter of a change of resolution.
        eps: of the group normalisations.
        scale: factor on every sum of a block and its shortcut.
        adaptive: the embedding scales and shifts the normalised features; otherwise it is added before normalising.
        head_dim: channels of an attention head; 0 is one head.
        project: the shortcut of a change of resolution has a 1x1 convolution, also where the channels stay.
    """

    taps: tuple[int, ...]
    eps: float
    scale: float
    adaptive: bool
    head_dim: int
    project: bool


SONG = Style(taps=(1, 3, 3, 1), eps=1e-6, scale=0.5**0.5, adaptive=False, head_dim=0, project=True)
ADM = Style(taps=(1, 1), eps=1e-5, scale=1.0, adaptive=True, head_dim=64, project=False)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation with min(32, C // 4) groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


def fir_kernel(taps: tuple[int, ...]) -> Tensor:
    """`outer(f, f) / sum(f)^2` as `(1, 1, len(f), len(f))`."""
    f = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(f, f) / f.sum() ** 2)[None, None]


def resample(x: Tensor, kernel: Tensor, direction: Direction) -> Tensor:
    """Half or twice the resolution of `x` `(B, C, H, W)` through the filter `kernel` `(1, 1, k, k)`."""
    channels, padding = x.shape[1], (kernel.shape[-1] - 1) // 2
    kernel = kernel.to(x.dtype).expand(channels, 1, -1, -1)
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)


class Resample(nn.Module):
    """A change of resolution by 2 without weights.

    Args:
        taps: FIR filter.
        direction: which way.
    """

    def __init__(self, taps: tuple[int, ...], direction: Direction):
        super().__init__()
        self.direction: Direction = direction
        self.register_buffer("resample_filter", fir_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to twice or half the height and width."""
        return resample(x, self.resample_filter, self.direction)


class ResampledConv(nn.Conv2d):
    """A convolution of the resampled input.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        size: 1 or 3.
        taps: FIR filter.
        direction: which way.
    """

    def __init__(self, inputs: int, outputs: int, size: int, taps: tuple[int, ...], direction: Direction):
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.direction: Direction = direction
        self.register_buffer("resample_filter", fir_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H', W')`."""
        return super().forward(resample(x, self.resample_filter, self.direction))


class ConvThenDown(nn.Conv2d):
    """A 3x3 convolution at the higher resolution, halved through the filter; the bias comes last.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        taps: FIR filter.
    """

    def __init__(self, inputs: int, outputs: int, taps: tuple[int, ...]):
        super().__init__(inputs, outputs, 3, padding=1 + (len(taps) - 1) // 2)
        self.register_buffer("resample_filter", fir_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, H, W)` to `(B, outputs, H / 2, W / 2)`."""
        h = F.conv2d(x, self.weight, padding=self.padding)
        kernel = self.resample_filter.to(h.dtype).expand(self.out_channels, 1, -1, -1)
        return F.conv2d(h, kernel, self.bias, stride=2, groups=self.out_channels)


class UNetBlock(nn.Module):
    """`x <- s (skip(x) + conv1(SiLU(norm1(conv0(SiLU(norm0 x)), emb))))`, then `x <- s (x + proj(attention(norm2 x)))`.

    Args:
        inputs: channels of the input.
        outputs: channels of the output, a multiple of 4.
        embedding: size of the embedding.
        style: of the network.
        dropout: probability in [0, 1).
        direction: change of resolution in front of `conv0` and `skip`, or None.
        attention: whether attention follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        style: Style,
        dropout: float = 0.0,
        direction: Direction | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.style = style
        self.heads = 0 if not attention else outputs // style.head_dim if style.head_dim else 1
        self.norm0 = group_norm(inputs, style.eps)
        self.conv0 = (
            ResampledConv(inputs, outputs, 3, style.taps, direction)
            if direction
            else nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.affine = nn.Linear(embedding, 2 * outputs if style.adaptive else outputs)
        self.norm1 = group_norm(outputs, style.eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = _shortcut(inputs, outputs, style, direction)
        if self.heads:
            self.norm2 = group_norm(outputs, style.eps)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`(B, inputs, H, W)` and `(B, embedding)` to `(B, outputs, H', W')`."""
        h, a = self.conv0(F.silu(self.norm0(x))), self.affine(emb)[:, :, None, None]
        if self.style.adaptive:
            scale, shift = a.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + a)
        x = (self.skip(x) + self.conv1(self.dropout(F.silu(h)))) * self.style.scale
        return (x + self.proj(self.attend(self.norm2(x)))) * self.style.scale if self.heads else x

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over all pixels of `(B, C, H, W)`; channels of `qkv` are ordered (head, channel, q/k/v)."""
        qkv = self.qkv(x).flatten(2).unflatten(1, (self.heads, -1, 3)).movedim(3, 0).transpose(-1, -2)
        return F.scaled_dot_product_attention(*qkv).transpose(-1, -2).reshape(x.shape)


def _shortcut(inputs: int, outputs: int, style: Style, direction: Direction | None) -> nn.Module:
    if direction and (style.project or inputs != outputs):
        return ResampledConv(inputs, outputs, 1, style.taps, direction)
    if direction:
        return Resample(style.taps, direction)
    return nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
