"""NCSN++ and DDPM++ (arXiv 2011.13456 appendix H), the networks of Rectified Flow (arXiv 2209.03003)."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.nets.condition import (
    Condition,
    FourierEmbedding,
    attend,
    check_image_shape,
    check_input,
    positional_embedding,
    working_dtype,
)


def scaled_uniform(layer: nn.Linear | nn.Conv2d, scale: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Variance scaling, mean of fan-in and fan-out, uniform, zero biases; a scale of 0 means a variance of 1e-10."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale or 1e-10))
    nn.init.zeros_(layer.bias)
    return layer


def conv(inputs: int, outputs: int, size: int = 3, scale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps the resolution, initialised by `scaled_uniform`."""
    return scaled_uniform(nn.Conv2d(inputs, outputs, size, padding=size // 2), scale)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with min(C // 4, 32) groups."""
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


class Resample(nn.Module):
    """Parameter-free change of resolution by 2: nearest neighbour / 2x2 mean, or the FIR filter [1, 3, 3, 1].

    FIR, kernel k = outer(f, f) / 64: down = pad 1 on all sides, correlate with k, stride 2; up = zeros between the
    pixels, pad 2 before and 1 after, correlate with 4 k, which is the transposed convolution written here.

    Args:
        direction: which way.
        fir: filter with [1, 3, 3, 1] instead of repeating / averaging.
    """

    def __init__(self, direction: Literal["up", "down"], fir: bool):
        super().__init__()
        self.up = direction == "up"
        self.fir = fir
        if fir:
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
            self.register_buffer("kernel", torch.outer(taps, taps)[None, None] / 64, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to twice or half the height and width."""
        if not self.fir:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        if self.up:
            return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


class ResidualBlock(nn.Module):
    """BigGAN-style residual block of arXiv 2011.13456: (x + f(x, emb)) / sqrt 2, optionally changing the resolution.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        embedding: size of the time embedding.
        dropout: probability in [0, 1).
        resample: None, or "up" / "down" applied to the residual and to the shortcut.
        fir: see `Resample`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float = 0.0,
        resample: Literal["up", "down"] | None = None,
        fir: bool = False,
    ):
        super().__init__()
        self.norm0 = group_norm(inputs)
        self.resample = Resample(resample, fir) if resample else nn.Identity()
        self.conv0 = conv(inputs, outputs)
        self.time = scaled_uniform(nn.Linear(embedding, outputs))
        self.norm1 = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = conv(outputs, outputs, scale=0.0)
        self.shortcut = conv(inputs, outputs, size=1) if resample or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """`(B, inputs, H, W)` and `(B, embedding)` to `(B, outputs, H', W')`."""
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        return (self.shortcut(self.resample(x)) + h) * math.sqrt(0.5)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels with scale C^-1/2: (x + out(attention)) / sqrt 2.

    Args:
        channels: channels of input and output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.query, self.key, self.value = (scaled_uniform(nn.Linear(channels, channels), 0.1) for _ in range(3))
        self.out = scaled_uniform(nn.Linear(channels, channels), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        h = self.out(attend(self.query(tokens), self.key(tokens), self.value(tokens), heads=1))
        return (x + h.transpose(1, 2).unflatten(2, x.shape[2:])) * math.sqrt(0.5)


class Clock(nn.Module):
    """Time embedding of t `(B,)`, two linear layers on features of `s = time_scale * t`: `(B, dim)`.

    Args:
        width: of the features: sinusoidal ones of s, or that many random frequencies of log s.
        dim: size of the result.
        time_scale: s = time_scale * t.
        fourier: random Fourier features, which do not know t = 0.
    """

    def __init__(self, width: int, dim: int, time_scale: float, fourier: bool):
        super().__init__()
        self.width, self.time_scale = width, time_scale
        self.fourier = FourierEmbedding(width) if fourier else None
        self.first = scaled_uniform(nn.Linear(2 * width if fourier else width, dim))
        self.second = scaled_uniform(nn.Linear(dim, dim))

    def features(self, t: Tensor) -> Tensor:
        """What the linear layers read: `(B, width)`, or `(B, 2 width)` for Fourier features."""
        if self.fourier is not None:
            return self.fourier((self.time_scale * t.to(working_dtype(t))).log())
        return positional_embedding(t, self.width, self.time_scale)

    def forward(self, t: Tensor) -> Tensor:
        return self.second(F.silu(self.first(self.features(t).to(self.first.weight.dtype))))


class Combine(nn.Module):
    """Adds a 1x1 convolution of the image pyramid to the features.

    Args:
        image: channels of the pyramid.
        channels: channels of the features.
    """

    def __init__(self, image: int, channels: int):
        super().__init__()
        self.conv = conv(image, channels, size=1)

    def forward(self, pyramid: Tensor, h: Tensor) -> Tensor:
        """`(B, image, H, W)` and `(B, channels, H, W)` to `(B, channels, H, W)`."""
        return self.conv(pyramid) + h


class NCSNpp(nn.Module):
    """The score network NCSN++ and its simpler form DDPM++ (arXiv 2011.13456 appendix H) as a velocity field.

    `layers` holds every layer with weights after the time embedding, in the order of the forward pass. The network
    receives t in [0, 1] and works with s = `time_scale` * t: the embedding is positional in s, or random Fourier
    features of log s; then t = 0 is outside the domain. Defaults are the CIFAR-10 DDPM++; see also `ddpmpp_cifar10` and
    `ncsnpp_256`.

    Args:
        shape: (C, H, W) of a sample; H and W multiples of 2^(levels - 1).
        width: channels of the first level, a multiple of 4.
        mult: channels of each level in units of `width`.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention: heights at which attention follows the residual blocks; the innermost level always has one.
        embedding: of the time.
        fir: resample with the filter [1, 3, 3, 1].
        progressive: feed an image pyramid into the way down and sum the output from a pyramid ("input_skip",
            "output_skip", "sum" in the words of the paper).
        divide_by_time: divide the output by s ("scale_by_sigma").
        centred: samples live in [-1, 1]; otherwise in [0, 1], and the network maps its input by x -> 2 x - 1.
        dropout: in the residual blocks.
        time_scale: s = time_scale * t.
        num_classes: 0 = unconditional. Otherwise a class embedding is added to that of the time.

    Attributes:
        no_start: options with which t = 0 would be known; empty if it is.
    """

    checkpoint_blocks = (ResidualBlock, AttentionBlock)

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        width: int = 128,
        mult: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        embedding: Literal["positional", "fourier"] = "positional",
        fir: bool = False,
        progressive: bool = False,
        divide_by_time: bool = False,
        centred: bool = True,
        dropout: float = 0.0,
        time_scale: float = 999.0,
        num_classes: int = 0,
    ):
        super().__init__()
        shape, mult = tuple(shape), tuple(mult)
        check_image_shape(shape, 2 ** (len(mult) - 1), f"{len(mult)} levels")
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        self.shape, self.num_classes, self.width = shape, num_classes, width
        self.levels, self.blocks = len(mult), blocks
        self.attention_levels = tuple(shape[1] >> level in attention for level in range(len(mult)))
        self.progressive, self.divide_by_time = progressive, divide_by_time
        self.centred, self.time_scale = centred, time_scale
        wrong = {"embedding=positional": embedding == "fourier", "divide_by_time=false": divide_by_time}
        self.no_start = " ".join(option for option, found in wrong.items() if found)
        self.time = Clock(width, 4 * width, time_scale, embedding == "fourier")
        self.condition = Condition(4 * width, num_classes)
        if progressive:
            self.pyramid_down, self.pyramid_up = Resample("down", fir), Resample("up", fir)
        self.layers = nn.ModuleList()
        add = self.layers.append
        image, emb = shape[0], 4 * width

        add(conv(image, width))
        skips, channels = [width], width
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                add(ResidualBlock(channels, width * factor, emb, dropout))
                channels = width * factor
                if self.attention_levels[level]:
                    add(AttentionBlock(channels))
                skips.append(channels)
            if level < self.levels - 1:
                add(ResidualBlock(channels, channels, emb, dropout, "down", fir))
                if progressive:
                    add(Combine(image, channels))
                skips.append(channels)
        add(ResidualBlock(channels, channels, emb, dropout))
        add(AttentionBlock(channels))
        add(ResidualBlock(channels, channels, emb, dropout))
        for level in reversed(range(self.levels)):
            for _ in range(blocks + 1):
                add(ResidualBlock(channels + skips.pop(), width * mult[level], emb, dropout))
                channels = width * mult[level]
            if self.attention_levels[level]:
                add(AttentionBlock(channels))
            if progressive or level == 0:
                add(group_norm(channels))
                add(conv(channels, image, scale=0.0))
            if level:
                add(ResidualBlock(channels, channels, emb, dropout, "up", fir))

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` `(B,)` with the null class where `mask` `(B,)` is true."""
        return self.condition.drop(cond, mask)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity `(B, C, H, W)` at x `(B, C, H, W)`, t `(B,)` in [0, 1] (0 = noise), cond `(B,)` classes or None."""
        check_input(x, t, self.shape)
        layers, emb = iter(self.layers), self.time(t)
        pooled, _ = self.condition(cond, len(x))
        if pooled is not None:
            emb = emb + pooled

        image = x if self.centred else 2 * x - 1
        pyramid = image
        h = next(layers)(image)
        skips = [h]
        for level in range(self.levels):
            for _ in range(self.blocks):
                h = next(layers)(h, emb)
                if self.attention_levels[level]:
                    h = next(layers)(h)
                skips.append(h)
            if level < self.levels - 1:
                h = next(layers)(h, emb)
                if self.progressive:
                    pyramid = self.pyramid_down(pyramid)
                    h = next(layers)(pyramid, h)
                skips.append(h)
        h = next(layers)(h, emb)
        h = next(layers)(h)
        h = next(layers)(h, emb)
        out = None
        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = next(layers)(torch.cat([h, skips.pop()], dim=1), emb)
            if self.attention_levels[level]:
                h = next(layers)(h)
            if self.progressive or level == 0:
                norm, head = next(layers), next(layers)
                image = head(F.silu(norm(h)))
                out = image if out is None else self.pyramid_up(out) + image
            if level:
                h = next(layers)(h, emb)
        if self.divide_by_time:
            out = out / (self.time_scale * t).to(out.dtype)[:, None, None, None]
        return out


def ddpmpp_cifar10(dropout: float = 0.15, num_classes: int = 0) -> NCSNpp:
    """DDPM++ of arXiv 2209.03003 for CIFAR-10: 61,804,419 parameters. Dropout 0.15 for the first flow, 0.1 later."""
    return NCSNpp(dropout=dropout, num_classes=num_classes)


def ncsnpp_256(dropout: float = 0.0, centred: bool = True, num_classes: int = 0) -> NCSNpp:
    """NCSN++ of arXiv 2209.03003 at 256 px: 65,574,549 parameters, of which 128 frozen Fourier frequencies.

    Args:
        dropout: of the residual blocks.
        centred: True for CelebA-HQ and AFHQ (data in [-1, 1]), False for LSUN church and bedroom (data in [0, 1]).
        num_classes: 0 = unconditional.
    """
    return NCSNpp(
        shape=(3, 256, 256),
        mult=(1, 1, 2, 2, 2, 2, 2),
        blocks=2,
        embedding="fourier",
        fir=True,
        progressive=True,
        divide_by_time=True,
        centred=centred,
        dropout=dropout,
        num_classes=num_classes,
    )
