"""Costs of a pyramid's parts beside the closed form and what the papers publish."""

from typing import NamedTuple

from torch import nn

from penstock.lightning_modules.nets.piip.cross_attention import DeformableAttention
from penstock.lightning_modules.nets.piip.flops import PATCH, Part, Shape, counted, pyramid_operations
from penstock.lightning_modules.nets.piip.pyramid import Pyramid
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
}


class Costs(NamedTuple):
    """Of a network and an image of its nominal size.

    Attributes:
        parts: By their names.
        closed_form: Operations of branches and interactions, and of the light merging that published numbers of dense
            models count in place of the real one; None where a branch or a unit is of another kind.
        published: 1e9 operations that the papers give for such branches; None where they give none.
    """

    parts: dict[str, Part]
    closed_form: int | None
    published: float | None


def costs(net: nn.Module, channels: int = 3) -> Costs:
    """What a network with a `pyramid` costs.

    Args:
        net: On the meta device, in evaluation mode.
        channels: Of images.
    """
    pyramid: Pyramid = net.pyramid
    side = pyramid.branches[-1].size
    names = {
        f"branch {i}, {branch.dims[-1]} channels on {branch.size} pixels": f"pyramid.branches.{i}."
        for i, branch in enumerate(pyramid.branches)
    }
    names["interactions"] = "pyramid.interactions."
    names |= {name: f"{name}." for name, child in net.named_children() if name != "pyramid" and any(child.parameters())}
    found = counted(net, (side, side), list(names.values()), channels)
    key = tuple((branch.dims[-1], branch.size) for branch in pyramid.branches)
    return Costs({name: found[prefix] for name, prefix in names.items()}, _closed_form(pyramid), PUBLISHED.get(key))


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
