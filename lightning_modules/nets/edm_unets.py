"""The two networks of EDM (arXiv 2206.00364 appendix F.4): NCSN++ as trained there, and ADM; official state-dict names.

Both are called `F(x, c_noise, cond)`, `c_noise = ln(sigma) / 4`, and know nothing of flows: see `nets.edm`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.nets.condition import check_image_shape, working_dtype
from penstock.lightning_modules.nets.edm_blocks import ADM, SONG, ConvThenDown, Style, UNetBlock, group_norm


class _EDMUNet(nn.Module):
    """Encoder and decoder with the names `{H}x{W}_conv`, `_down`, `_aux_residual`, `_block{i}`, `_in0`, `_in1`, `_up`.

    Args:
        shape: (C, H, W) of a sample; H and W multiples of 2^(levels - 1).
        width: channels of the first level, a multiple of 4.
        mult: channels of each level in units of `width`.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention: heights at which attention follows the blocks; the first innermost block of the way up has it always.
        num_classes: 0 = unconditional.
        dropout: in the residual blocks.
        style: of the blocks.
        residual: feed the input, resampled and convolved, into each level of the encoder.
    """

    checkpoint_blocks = (UNetBlock,)

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int,
        mult: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        num_classes: int,
        dropout: float,
        style: Style,
        residual: bool,
    ):
        super().__init__()
        shape, mult = tuple(shape), tuple(mult)
        check_image_shape(shape, 2 ** (len(mult) - 1), f"{len(mult)} levels")
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        self.shape, self.num_classes, self.width, self.mult = shape, num_classes, width, mult
        emb, sizes = 4 * width, [(shape[1] >> level, shape[2] >> level) for level in range(len(mult))]

        def block(inputs: int, outputs: int, **options) -> UNetBlock:
            return UNetBlock(inputs, outputs, emb, style, dropout, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        channels, stream, skips = width, shape[0], [width]
        for (height, size), factor in zip(sizes, mult):
            name = f"{height}x{size}"
            if not self.enc:
                self.enc[f"{name}_conv"] = nn.Conv2d(shape[0], width, 3, padding=1)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, direction="down")
                if residual:
                    self.enc[f"{name}_aux_residual"] = ConvThenDown(stream, channels, style.taps)
                    stream = channels
                skips.append(channels)
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = block(channels, width * factor, attention=height in attention)
                channels = width * factor
                skips.append(channels)
        for (height, size), factor in zip(reversed(sizes), reversed(mult)):
            name = f"{height}x{size}"
            if not self.dec:
                self.dec[f"{name}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, direction="up")
            for i in range(blocks + 1):
                attended = height in attention and (i == blocks or style.adaptive)
                self.dec[f"{name}_block{i}"] = block(channels + skips.pop(), width * factor, attention=attended)
                channels = width * factor

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` `(B,)` with the null class `num_classes` where `mask` `(B,)` is true."""
        self._check(cond)
        return torch.where(mask, self.num_classes, cond)

    def one_hot(self, cond: Tensor | None, like: Tensor) -> Tensor:
        """`(B, num_classes)` in the dtype of `like` `(B, ...)`; the null class and None are all zero."""
        if cond is None:
            return like.new_zeros(len(like), self.num_classes)
        self._check(cond)
        return F.one_hot(cond, self.num_classes + 1)[:, :-1].to(like.dtype)

    def features(self, x: Tensor, emb: Tensor) -> Tensor:
        """`(B, C, H, W)` and `(B, 4 width)` to the features `(B, channels, H, W)` before the last convolution."""
        skips, stream = [], x
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):
                x = stream = (x + layer(stream)) * math.sqrt(0.5)
                skips[-1] = x
                continue
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return x

    def _check(self, cond: Tensor) -> None:
        if not self.num_classes:
            raise ValueError("this network is unconditional: set num_classes to give it a condition")
        if cond.ndim != 1 or cond.is_floating_point():
            raise ValueError(f"expected int64 class labels (B,), got {cond.dtype} {tuple(cond.shape)}")


class NoiseFrequencies(nn.Module):
    """Random Fourier features `[sin(2 pi f c), cos(2 pi f c)]`, `f ~ N(0, scale^2)`, a buffer under its official name.

    Args:
        frequencies: how many; the embedding is twice as long.
        scale: standard deviation.
    """

    def __init__(self, frequencies: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("freqs", torch.randn(frequencies) * scale)

    def forward(self, c_noise: Tensor) -> Tensor:
        """`(B,)` to `(B, 2 * frequencies)`, float32 (float64 for float64)."""
        dtype = working_dtype(c_noise)
        angles = 2 * math.pi * c_noise.to(dtype)[:, None] * self.freqs.to(dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class SongUNet(_EDMUNet):
    """NCSN++ in the configuration that EDM calls `ncsnpp` (arXiv 2206.00364 table 7, columns VE).

    Fourier features of twice the width, residual encoder, standard decoder, filter [1, 3, 3, 1]. Defaults are CIFAR-10.

    Args:
        shape: (C, H, W) of a sample; H and W multiples of 2^(levels - 1).
        width: channels of the first level, a multiple of 4.
        mult: channels of each level in units of `width`.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention: heights at which attention follows, on the way up after the last block only.
        num_classes: 0 = unconditional.
        augment_dim: size of EDM's augmentation label, here always 0 (not augmented); 0 = no such weights.
        dropout: in the residual blocks.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 32, 32),
        width: int = 128,
        mult: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        num_classes: int = 0,
        augment_dim: int = 9,
        dropout: float = 0.0,
    ):
        super().__init__(shape, width, mult, blocks, attention, num_classes, dropout, SONG, residual=True)
        self.augment_dim = augment_dim
        self.map_noise = NoiseFrequencies(width)
        if num_classes:
            self.map_label = nn.Linear(num_classes, 2 * width)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, 2 * width, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(2 * width, 4 * width), nn.Linear(4 * width, 4 * width)
        outputs, name = width * self.mult[0], f"{self.shape[1]}x{self.shape[2]}"
        self.dec[f"{name}_aux_norm"] = group_norm(outputs, SONG.eps)
        self.dec[f"{name}_aux_conv"] = nn.Conv2d(outputs, self.shape[0], 3, padding=1)
        self.head = f"{name}_aux_norm", f"{name}_aux_conv"
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                _xavier(layer)
        _xavier(self.dec[self.head[1]], 1e-5)
        for layer in self.modules():
            if isinstance(layer, UNetBlock):
                _xavier(layer.conv1, 1e-5)
                if layer.heads:
                    _xavier(layer.qkv, 0.2**0.5)
                    _xavier(layer.proj, 1e-5)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """F `(B, C, H, W)` at scaled input x `(B, C, H, W)`, c_noise `(B,)`, cond `(B,)` classes or None."""
        emb = self.map_noise(c_noise).to(self.map_layer0.weight.dtype)
        if self.num_classes:
            emb = emb + self.map_label(self.one_hot(cond, emb) * math.sqrt(self.num_classes))
        elif cond is not None:
            self._check(cond)
        if self.augment_dim:
            emb = emb + self.map_augment(emb.new_zeros(len(emb), self.augment_dim))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        norm, conv = (self.dec[name] for name in self.head)
        return conv(F.silu(norm(self.features(x, emb))))


class DhariwalUNet(_EDMUNet):
    """ADM (arXiv 2105.05233) as EDM builds it (arXiv 2206.00364 table 7, ImageNet). Defaults are ImageNet-64.

    Args:
        shape: (C, H, W) of a sample; H and W multiples of 2^(levels - 1).
        width: channels of the first level, a multiple of 4.
        mult: channels of each level in units of `width`.
        blocks: residual blocks of a level on the way down; one more on the way up.
        attention: heights at which attention follows every block, with heads of 64 channels (none below 64).
        num_classes: 0 = unconditional.
        dropout: in the residual blocks.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 64, 64),
        width: int = 192,
        mult: Sequence[int] = (1, 2, 3, 4),
        blocks: int = 3,
        attention: Sequence[int] = (32, 16, 8),
        num_classes: int = 1000,
        dropout: float = 0.0,
    ):
        super().__init__(shape, width, mult, blocks, attention, num_classes, dropout, ADM, residual=False)
        emb, outputs = 4 * width, width * self.mult[0]
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        if num_classes:
            self.map_label = nn.Linear(num_classes, emb, bias=False)
            nn.init.normal_(self.map_label.weight)
        self.out_norm = group_norm(outputs, ADM.eps)
        self.out_conv = nn.Conv2d(outputs, self.shape[0], 3, padding=1)
        zeroed = [layer for block in self.modules() if isinstance(block, UNetBlock) for layer in _last(block)]
        for layer in [self.out_conv, *zeroed]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """F `(B, C, H, W)` at scaled input x `(B, C, H, W)`, c_noise `(B,)`, cond `(B,)` classes or None."""
        emb = self.embed(c_noise).to(self.map_layer0.weight.dtype)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.num_classes:
            emb = emb + self.map_label(self.one_hot(cond, emb))
        elif cond is not None:
            self._check(cond)
        return self.out_conv(F.silu(self.out_norm(self.features(x, F.silu(emb)))))

    def embed(self, c_noise: Tensor) -> Tensor:
        """`[cos(w c), sin(w c)]` with `w_i = 10000^(-2 i / width)`: `(B,)` to `(B, width)`, float32 (or float64)."""
        dtype, half = working_dtype(c_noise), self.width // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=c_noise.device, dtype=dtype) / half)
        angles = c_noise.to(dtype)[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def _last(block: UNetBlock) -> list[nn.Conv2d]:
    return [block.conv1, block.proj] if block.heads else [block.conv1]


def _xavier(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
