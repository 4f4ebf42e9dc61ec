"""What a pyramid costs, part by part, counted as its authors count; and the closed form of it.

One multiplication with its addition is one operation. Attention counts `2 n^2 D` a block, in windows `2 n w^2 D`, of
the n patches without padding; deformable attention `5 n P D`, which leaves out the width of values. Norms count two
operations an element, ReLUs one, biases of convolutions one an output, all else nothing (arXiv 2406.04330's scripts).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from penstock.lightning_modules.nets.piip.cross_attention import DeformableAttention, DenseAttention

PATCH = 16


class Part(NamedTuple):
    """Of a network: operations of a forward pass of one image, and parameters."""

    operations: int
    parameters: int


def counted(
    net: nn.Module, image_size: tuple[int, int], parts: Sequence[str], channels: int = 3, place: str = ""
) -> dict[str, Part]:
    """What parts of a network with a `pyramid` cost, and `others`.

    Args:
        net: On the meta device, in evaluation mode.
        image_size: (height, width).
        parts: Beginnings of the names of parameters, such as `pyramid.branches.0.`; none holds another.
        channels: Of images.
        place: Name of the module with the `pyramid`; nothing for the network itself.
    """
    spent: Counter[str] = Counter()

    def counter(name: str, rule: Callable[..., int]) -> Callable[..., None]:
        return lambda module, given, out: spent.update({f"{name}.": rule(module, given, out)})

    hooks = [
        module.register_forward_hook(counter(name, rule))
        for name, module in net.named_modules()
        for kind, rule in RULES.items()
        if isinstance(module, kind)
    ]
    try:
        with torch.no_grad():
            net(torch.empty(1, channels, *image_size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    pyramid = net.get_submodule(place).pyramid
    for i, branch in enumerate(pyramid.branches):
        own = tuple(int(side * branch.size / pyramid.size) for side in image_size)
        spent[f"{within(place)}pyramid.branches.{i}."] += branch.attention_operations(own)
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    rows = {part: Part(_of(part, spent), _of(part, sizes)) for part in parts}
    rest = (sum(all_.values()) - sum(row[k] for row in rows.values()) for k, all_ in enumerate((spent, sizes)))
    return rows | {"others": Part(*rest)}


def within(place: str) -> str:
    """How names of what a module at `place` holds begin."""
    return f"{place}." if place else ""


def _of(part: str, amounts: Mapping[str, int]) -> int:
    return sum(amount for name, amount in amounts.items() if name.startswith(part))


def _linear(module: nn.Linear, given: tuple[Any, ...], out: Tensor) -> int:
    return given[0].numel() * module.out_features


def _conv(module: nn.Conv2d | nn.ConvTranspose2d, given: tuple[Any, ...], out: Tensor) -> int:
    places = given[0] if isinstance(module, nn.ConvTranspose2d) else out
    each = math.prod(module.kernel_size) * module.in_channels * module.out_channels // module.groups
    return places[:, 0].numel() * each + (out.numel() if module.bias is not None else 0)


def _norm(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> int:
    return 2 * given[0].numel()


def _activation(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> int:
    return given[0].numel()


def _deformable(module: DeformableAttention, given: tuple[Any, ...], out: Tensor) -> int:
    return 5 * module.points * given[0].numel()


def _dense(module: DenseAttention, given: tuple[Any, ...], out: Tensor) -> int:
    return 2 * given[0].numel() * given[2].shape[1]


RULES: dict[type | tuple[type, ...], Callable[..., int]] = {
    nn.Linear: _linear,
    (nn.Conv2d, nn.ConvTranspose2d): _conv,
    (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm2d): _norm,
    nn.ReLU: _activation,
    DeformableAttention: _deformable,
    DenseAttention: _dense,
}


class Shape(NamedTuple):
    """Of a vision transformer on a square image: width D, number of blocks, side of the image in pixels, side of the
    windows of the first of its blocks in cells and the number of these."""

    dim: int
    depth: int
    size: int
    window: int = 0
    windowed: int = 0

    @property
    def tokens(self) -> int:
        return (self.size // PATCH) ** 2


def vit_operations(shape: Shape) -> int:
    """Of the blocks and the embedding of patches, without norms and biases."""
    n, dim = shape.tokens, shape.dim
    attention = 2 * n * dim * ((shape.depth - shape.windowed) * n + shape.windowed * shape.window**2)
    return 12 * shape.depth * n * dim**2 + attention + 3 * PATCH**2 * n * dim


def unit_operations(coarse: Shape, fine: Shape, heads: int = 16, points: int = 4, speed_up: bool = False) -> int:
    """Of an interaction unit of deformable attention, likewise."""
    total = 0 if speed_up else (coarse.tokens + fine.tokens) * coarse.dim * fine.dim
    for own, other in ((coarse, fine), (fine, coarse)):
        n, dim = own.tokens, own.dim
        read = other.dim if speed_up else dim
        attention = 3 * heads * points * n * dim + other.tokens * read * dim // 2 + n * dim**2 // 2
        total += attention + n * dim**2 // 2 + 9 * n * dim // 4 + 5 * points * n * dim
    return total


def pyramid_operations(shapes: Sequence[Shape], interactions: int = 12, light_merge: bool = True, **unit: Any) -> int:
    """The closed form: branches, units and, if asked, the merging of classification.

    Args:
        shapes: Of the branches, the coarsest first.
        interactions: Number of them.
        light_merge: Whether the others are projected to the first's width.
        unit: Of `unit_operations`.
    """
    units = sum(unit_operations(a, b, **unit) for a, b in pairwise(shapes))
    merge = sum(shape.tokens * shape.dim * shapes[0].dim for shape in shapes[1:]) if light_merge else 0
    return sum(map(vit_operations, shapes)) + interactions * units + merge
