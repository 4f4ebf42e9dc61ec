"""Costs of a pyramid's parts beside the closed form and what the papers publish."""

from typing import NamedTuple

from torch import nn

from penstock.lightning_modules.nets.piip.cross_attention import DeformableAttention
from penstock.lightning_modules.nets.piip.dense import MergedPyramid, PiipBackbone
from penstock.lightning_modules.nets.piip.flops import PATCH, Part, Shape, counted, pyramid_operations, within
from penstock.lightning_modules.nets.piip.hybrid import PiipHybridBackbone
from penstock.lightning_modules.nets.piip.pyramid import Branch, Pyramid
from penstock.lightning_modules.nets.piip.vit import TransformerBranch

PUBLISHED = {  # 1e9 operations of backbones, by (width, side of the image) from the smallest image on
    ((768, 128), (384, 192), (192, 368)): 17.4,
    ((1024, 96), (768, 160), (384, 320)): 39.0,
    ((1024, 128), (768, 192), (384, 384)): 61.2,
    ((768, 448), (384, 896), (192, 1120)): 243.0,
    ((768, 448), (384, 896), (192, 1568)): 287.0,
    ((768, 672), (384, 1120), (192, 1568)): 453.0,
    ((1024, 448), (768, 672), (384, 1120)): 727.0,
    ((1024, 448), (768, 896), (384, 1344)): 1002.0,
    ((1024, 672), (768, 896), (384, 1568)): 1464.0,
    ((1024, 448), (768, 672), (384, 896), (192, 1344)): 755.0,
    ((1024, 448), (768, 672), (384, 1120), (192, 1568)): 861.0,
    ((1024, 448), (768, 1120), (384, 1568), (192, 1792)): 1535.0,
    ((3200, 512), (1280, 1024)): 11080.0,
    ((3200, 192), (1280, 512)): 1663.0,
    ((3200, 256), (1280, 512)): 2354.0,
    ((3200, 384), (1280, 512)): 4374.0,
    ((3200, 512), (1280, 512)): 7308.0,
    ((768, 1024),): 463.0,
    ((1024, 1024),): 1542.0,
    ((3200, 1024),): 29323.0,
    ((1024, 448), (768, 672), (768, 1024)): 326.0,
    ((768, 448), (384, 672), (768, 1024)): 373.0,
    ((768, 448), (768, 672), (768, 1024)): 431.0,
    ((1024, 448), (384, 672), (768, 1024)): 297.0,
    ((768, 448), (768, 672), (192, 1024)): 291.0,
    ((1024, 448), (768, 672), (192, 1024)): 231.0,
    ((1024, 448), (384, 672), (192, 1024)): 193.0,
}


class Costs(NamedTuple):
    """Of a network and an image of its nominal size.

    Attributes:
        parts: By their names.
        as_published: Operations of a dense backbone as the papers count them, whatever stands on it: with the light
            merging of classification in the place of their own and of what follows it; of hybrids with their merging,
            without what follows it. None of other networks.
        closed_form: The same without norms and biases, of other networks too; None where a branch or a unit is of
            another kind.
        published: 1e9 operations that the papers give for such branches; None where they give none.
    """

    parts: dict[str, Part]
    as_published: int | None
    closed_form: int | None
    published: float | None


def costs(net: nn.Module, channels: int = 3, place: str = "") -> Costs:
    """What a network with a `pyramid` costs.

    Args:
        net: On the meta device, in evaluation mode.
        channels: Of images.
        place: Name of the module with the `pyramid`; nothing for the network itself.
    """
    holder, begin = net.get_submodule(place), within(place)
    pyramid: Pyramid = holder.pyramid
    side = pyramid.size
    names = {
        f"branch {i}, {branch.dims[-1]} channels on {branch.size} pixels": f"{begin}pyramid.branches.{i}."
        for i, branch in enumerate(pyramid.branches)
    }
    names["interactions"] = f"{begin}pyramid.interactions."
    names |= {name: f"{begin}{name}." for name in _children(holder) if name != "pyramid"}
    below = list(names)
    names |= {name: f"{name}." for name in _children(net) if place and name != place}
    found = counted(net, (side, side), list(names.values()), channels, place)
    parts = {name: found[prefix] for name, prefix in names.items()}
    key = tuple((branch.dims[-1], branch.size) for branch in pyramid.branches)
    as_published = None
    if isinstance(holder, MergedPyramid):
        left_out = ("fpn",) if isinstance(holder, PiipHybridBackbone) else ("merge", "fpn")
        as_published = sum(parts[name].operations for name in below if name not in left_out)
    if isinstance(holder, PiipBackbone):
        as_published += _light_merge(list(pyramid.branches))
    return Costs(parts, as_published, _closed_form(pyramid), PUBLISHED.get(key))


def _children(module: nn.Module) -> list[str]:
    """Names of a module's children with parameters."""
    return [name for name, child in module.named_children() if [*child.parameters()]]


def _light_merge(branches: list[Branch]) -> int:
    """A norm of the first branch, and of all others a layer between two norms."""
    cells, dims = ([(b.size // b.strides[-1]) ** 2 for b in branches], [b.dims[-1] for b in branches])
    others = sum(n * (dim * dims[0] + 2 * (dim + dims[0])) for n, dim in zip(cells[1:], dims[1:]))
    return 2 * cells[0] * dims[0] + others


def _closed_form(pyramid: Pyramid) -> int | None:
    branches = list(pyramid.branches)
    units = [unit for interaction in pyramid.interactions for unit in interaction]
    plain = all(isinstance(branch, TransformerBranch) and branch.patch == PATCH for branch in branches)
    if not plain or not all(isinstance(unit.coarse.attn, DeformableAttention) for unit in units):
        return None
    shapes = [Shape(b.dims[-1], b.depth, b.size, *_windows(b.windows)) for b in branches]
    if not units:
        return pyramid_operations(shapes, 0)
    attn = units[0].coarse.attn
    speed_up = isinstance(units[0].to_fine, nn.Identity)
    separate = branches[0].head is not None
    return pyramid_operations(
        shapes, len(pyramid.interactions), not separate, heads=attn.heads, points=attn.points, speed_up=speed_up
    )


def _windows(windows: list[int | None]) -> tuple[int, int]:
    sides = [window for window in windows if window is not None]
    return (sides[0] if sides else 0), len(sides)
