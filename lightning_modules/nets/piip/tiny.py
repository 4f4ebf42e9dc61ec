"""Pyramids of small vision transformers of random weights, for embedded data and small sets."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.vit import VitBranch

HEAD = 16  # channels of a head of attention
HEADS = 8  # of interactions


def tiny_classifier(
    sizes: Sequence[int],
    dims: Sequence[int],
    num_classes: int,
    depth: int = 4,
    patch: int = 8,
    interactions: bool = True,
    drop_path: float = 0.0,
    head: Literal["separate", "merged"] = "separate",
    size: int | None = None,
) -> PiipClassifier:
    """A classifier.

    Args:
        sizes: Sides of the branches' images, pixels, the smallest first.
        dims: Channels of the branches, multiples of 16.
        num_classes: K.
        depth: Blocks of each, with an interaction behind each.
        patch: Side of patches, pixels.
        interactions: Whether there are any; without, branches only meet at the end.
        drop_path: Of interactions, see `InteractionUnit`.
        head: See `PiipClassifier`.
        size: See `Pyramid`.

    Raises:
        UserError: channels that do not fit, or as `Pyramid`.
    """
    more = {"num_classes": num_classes, "class_token": True}
    branches = _branches(sizes, dims, depth, patch, **more)
    return PiipClassifier(branches, num_classes, _unit(interactions, drop_path), head, size=size)


def tiny_backbone(
    sizes: Sequence[int],
    dims: Sequence[int],
    depth: int = 4,
    patch: int = 16,
    interactions: bool = True,
    drop_path: float = 0.0,
    maps: Literal[3, 4] = 4,
) -> PiipBackbone:
    """A backbone of dense tasks; arguments as `tiny_classifier`'s, channels multiples of 32.

    Args:
        sizes: Of images.
        dims: Of tokens.
        depth: Of the branches.
        patch: Side.
        interactions: Whether there are any.
        drop_path: Of them.
        maps: See `PiipBackbone`.

    Raises:
        UserError: as `tiny_classifier`.
    """
    return PiipBackbone(_branches(sizes, dims, depth, patch), _unit(interactions, drop_path), maps=maps)


def _branches(sizes: Sequence[int], dims: Sequence[int], depth: int, patch: int, **more: Any) -> list[VitBranch]:
    if len(sizes) != len(dims):
        raise UserError(f"dims: found {len(dims)}, expected {len(sizes)}, one for each of sizes={list(sizes)}")
    if wrong := [dim for dim in dims if dim < HEAD or dim % HEAD]:
        raise UserError(f"dims: found {wrong[0]}, expected multiples of {HEAD}")
    own = {"weights": "random", "resize_table": True, "layer_scale": None, "groups": depth, "depth": depth, **more}
    return [
        VitBranch("vit_tiny_patch16_224", size, patch=patch, embed_dim=dim, num_heads=dim // HEAD, **own)
        for size, dim in zip(sizes, dims)
    ]


def _unit(interactions: bool, drop_path: float) -> Any:
    return partial(InteractionUnit, heads=HEADS, drop_path=drop_path) if interactions else None
