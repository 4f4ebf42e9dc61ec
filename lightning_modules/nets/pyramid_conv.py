"""Scale-equalizing pyramid convolution, arXiv 2005.03101.

A pyramid is a list of maps `(B, C, H_l, W_l)`, l = 0 the finest, each half as large as the one before. Names of
parameters are those of the official code, so that its state dicts load as they are.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.detection.ranges import at_least
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.deformable import deformed

Pyramid = Sequence[Tensor]
RIGID = 1  # levels below this one are convolved without offsets


class ScaleEqualizingConv(nn.Conv2d):
    """A 3x3 convolution shared by the levels, deformable (v1: offsets alone) where its result goes to a level above 0.

    Offsets `(B, 18, H', W')`, dy and dx of the nine taps in turn, are predicted from the map itself by a convolution
    that starts at zero; they and the sampling are in float32 whatever autocast says.

    Args:
        channels: Of the map and of the result.
        stride: 1 or 2.
        padding: Of zeros.
        deformable: Whether there are offsets.
    """

    def __init__(self, channels: int, stride: int = 1, padding: int = 1, deformable: bool = False):
        super().__init__(channels, channels, 3, stride, padding)
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)
        self.conv_offset = nn.Conv2d(channels, 18, 3, stride, padding) if deformable else None
        if self.conv_offset is not None:
            nn.init.zeros_(self.conv_offset.weight)
            nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        """The map `x` convolved for level `level`, which need not be the level of `x`."""
        if self.conv_offset is None or level < RIGID:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            return deformed(x, self.conv_offset(x), self.weight, self.bias, self.stride[0], self.padding[0])


def integrated(norm: nn.BatchNorm2d, pyramid: Pyramid) -> list[Tensor]:
    """Integrated batch norm (section 2.3): one mean and one variance of all positions of all levels.

    Maps in channels-last memory stay so.

    Args:
        norm: Of C channels; in training mode, its running statistics move once; else it is the same for every map.
        pyramid: Maps `(B, C, H_l, W_l)`.
    """
    if not norm.training:
        return [norm(x) for x in pyramid]
    sizes = [x.shape[-2:] for x in pyramid]
    if not pyramid[0].is_contiguous() and pyramid[0].is_contiguous(memory_format=torch.channels_last):
        rows = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in pyramid], 1)
        rows = norm(rows.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        parts = rows.split([h * w for h, w in sizes], 1)
        return [part.unflatten(1, size).permute(0, 3, 1, 2) for part, size in zip(parts, sizes)]
    flat = norm(torch.cat([x.flatten(2) for x in pyramid], 2).unsqueeze(-1)).squeeze(-1)
    parts = flat.split([h * w for h, w in sizes], 2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes)]


class PyramidConv(nn.Module):
    """One layer, eq. 2: `y^l = up(w_1 * x^{l+1}) + w_0 * x^l + w_{-1} *_2 x^{l-1}`, then norm and ReLU.

    Every level is made of the levels before the layer. The coarse term is convolved where it lies and then brought to
    the size of level l, bilinearly with aligned corners.

    Args:
        channels: C of all levels.
        deformable: Scale-equalizing: offsets on the way to all levels but the finest.
        ibn: With integrated batch norm.
    """

    def __init__(self, channels: int, deformable: bool = False, ibn: bool = False):
        super().__init__()
        self.Pconv = nn.ModuleList(ScaleEqualizingConv(channels, s, deformable=deformable) for s in (1, 1, 2))
        self.bn = nn.BatchNorm2d(channels) if ibn else None

    def sums(self, pyramid: Pyramid) -> list[Tensor]:
        """The sums of the terms, before norm and ReLU."""
        coarse, own, fine = self.Pconv
        found = []
        for level, x in enumerate(pyramid):
            y = own(x, level)
            if level > 0:
                y = y + fine(pyramid[level - 1], level)
            if level < len(pyramid) - 1:
                up = coarse(pyramid[level + 1], level)
                y = y + F.interpolate(up, y.shape[-2:], mode="bilinear", align_corners=True)
            found.append(y)
        return found

    def forward(self, pyramid: Pyramid) -> list[Tensor]:
        """Maps `(B, C, H_l, W_l)` of the same sizes.

        Raises:
            UserError: a level is not half as large as the one before it.
        """
        check_halves(pyramid)
        return activated(self.sums(pyramid), self.bn)


class PyramidConvNeck(nn.Module):
    """Layers of `PyramidConv` that both tasks share, and a last convolution for each: SEPC.

    Args:
        channels: C of all levels.
        layers: Of `PyramidConv`.
        pconv_deform: Whether these are scale-equalizing.
        lcconv_deform: Whether the last convolutions are.
        ibn: With integrated batch norm after every layer.
        lcconv_padding: Of the last convolutions; the released weights were trained with 0, which takes a row and a
            column off every side of every map.

    Raises:
        UserError: no layer, or another padding.
    """

    def __init__(
        self,
        channels: int = 256,
        layers: int = 4,
        pconv_deform: bool = False,
        lcconv_deform: bool = False,
        ibn: bool = False,
        lcconv_padding: int = 1,
    ):
        super().__init__()
        if lcconv_padding not in (0, 1):
            raise UserError(f"neck.lcconv_padding: found {lcconv_padding}, expected 1, or 0 for the released weights")
        at_least(1, neck__layers=layers)
        self.Pconvs = nn.ModuleList(PyramidConv(channels, pconv_deform, ibn) for _ in range(layers))
        self.lconv = ScaleEqualizingConv(channels, 1, lcconv_padding, lcconv_deform)
        self.cconv = ScaleEqualizingConv(channels, 1, lcconv_padding, lcconv_deform)
        self.lbn = nn.BatchNorm2d(channels) if ibn else None
        self.cbn = nn.BatchNorm2d(channels) if ibn else None

    def forward(self, pyramid: Pyramid) -> list[tuple[Tensor, Tensor]]:
        """Features `(B, C, H_l, W_l)` of classification and of localization, for each level.

        Raises:
            UserError: a level is not half as large as the one before it, or too small for the last convolutions.
        """
        for layer in self.Pconvs:
            pyramid = layer(pyramid)
        smallest = min(min(x.shape[-2:]) for x in pyramid)
        if not self.cconv.padding[0] and smallest < 3:
            raise UserError(
                f"model.net.neck.lcconv_padding: found 0 with a map of {smallest} cells a side, expected 1, or larger "
                "images (3 cells)"
            )
        found = []
        for conv, norm in ((self.cconv, self.cbn), (self.lconv, self.lbn)):
            found.append(activated([conv(x, level) for level, x in enumerate(pyramid)], norm))
        return list(zip(*found))

    @torch.no_grad()
    def folded(self) -> "PyramidConvNeck":
        """A copy in evaluation mode whose norms are inside of the convolutions."""
        result = copy.deepcopy(self).eval()
        for layer in result.Pconvs:
            _fold(layer.bn, layer.Pconv[1], *layer.Pconv)
            layer.bn = None
        _fold(result.cbn, result.cconv, result.cconv)
        _fold(result.lbn, result.lconv, result.lconv)
        result.cbn = result.lbn = None
        return result


def activated(pyramid: Pyramid, norm: nn.BatchNorm2d | None) -> list[Tensor]:
    """Integrated batch norm, if any, and ReLU."""
    return [x.relu() for x in (pyramid if norm is None else integrated(norm, pyramid))]


def check_halves(pyramid: Pyramid) -> None:
    """Refuses maps that a convolution of stride 2 does not bring to one another.

    Raises:
        UserError: a level has another size than half of the one before it, rounded up.
    """
    for level, (fine, coarse) in enumerate(pairwise(pyramid)):
        expected = tuple(-(-n // 2) for n in fine.shape[-2:])
        if tuple(coarse.shape[-2:]) != expected:
            raise UserError(
                f"pyramid: level {level + 1} is {tuple(coarse.shape[-2:])} under {tuple(fine.shape[-2:])}, "
                f"expected {expected}"
            )


def _fold(norm: nn.BatchNorm2d | None, shifted: ScaleEqualizingConv, *convs: ScaleEqualizingConv) -> None:
    """Puts the scale of a norm into all terms of a sum, and its shift into the one that every level has."""
    if norm is None:
        return
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    for conv in convs:
        conv.weight *= scale.view(-1, 1, 1, 1)
        conv.bias *= scale
    shifted.bias += norm.bias - scale * norm.running_mean
