"""What pyramids cost: the authors' counts, closed forms, published numbers, parameters."""

from functools import partial

import pytest
import torch
from torch import nn

from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.flops import (
    Shape,
    counted,
    pyramid_operations,
    unit_operations,
    vit_operations,
)
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.presets import classifier, dense
from penstock.lightning_modules.nets.piip.vit import VitBranch

WIDTH = {"T": (192, 12), "S": (384, 12), "B": (768, 12), "L": (1024, 24), "H": (1280, 32), "6B": (3200, 48)}
VIT = {"T": "deit_tiny_patch16_224", "S": "deit3_small_patch16_224", "B": "deit3_base_patch16_224"}
VIT["L"] = "deit3_large_patch16_224"


def shapes(letters, sizes, window: int = 0) -> list[Shape]:
    """Of branches, given from the largest image to the smallest."""
    found = [(*WIDTH[letter], size, window, WIDTH[letter][1] if window else 0) for letter, size in zip(letters, sizes)]
    return [Shape(*one) for one in found[::-1]]


def total(net: nn.Module, side: int) -> tuple[int, int]:
    """Operations and parameters."""
    parts = counted(net.eval(), (side, side), ["pyramid.interactions."])
    assert parts["pyramid.interactions."].operations > 0
    return tuple(sum(part[k] for part in parts.values()) for k in (0, 1))


def meta(make):
    with torch.device("meta"):
        return make()


def light(letters: str, sizes, window: int) -> PiipClassifier:
    """The authors' graph of dense models: merged by norms and a layer, with a classifier of 1000."""
    branches = [
        VitBranch(VIT[letter], size, 12, "random", window=window, resize_table=True)
        for letter, size in zip(letters[::-1], sizes[::-1])
    ]
    return PiipClassifier(branches, 1000, head="merged")


@pytest.mark.parametrize(
    ("letters", "sizes", "window", "operations", "parameters"),
    [
        ("TSB", (1120, 896, 448), 14, 243132125952, 146441707),
        ("TSB", (1568, 896, 448), 14, 286615149312, 147344875),
        ("SBL", (1120, 672, 448), 28, 726638942720, 492674027),
    ],
)
def test_dense_counts_of_the_authors(letters, sizes, window, operations, parameters):
    assert total(meta(partial(light, letters, sizes, window)), sizes[0]) == (operations, parameters)


@pytest.mark.parametrize(
    ("letters", "sizes", "pretrained", "operations", "parameters"),
    [
        ("TSB", (368, 192, 128), "deit", 17427520704, 144031416),
        ("SBL", (320, 160, 96), "augreg", 39015725056, 488795832),
        ("SBL", (384, 192, 128), "augreg", 61189356544, 488925880),
    ],
)
def test_classification_counts_of_the_authors(letters, sizes, pretrained, operations, parameters):
    net = meta(partial(classifier, letters, sizes, 1000, pretrained, weights=["random"] * 3))
    found = total(net, sizes[0])
    # the authors norm all tokens at the end, of which one is read, and keep the class token's position of AugReg
    final = sum(2 * ((branch.size // 16) ** 2 - 1) * branch.dims[0] for branch in net.pyramid.branches)
    unused = sum(branch.dims[0] for branch in net.pyramid.branches) if pretrained == "augreg" else 0
    assert found == (operations - final, parameters - unused)


@pytest.mark.parametrize(
    ("letters", "sizes", "parameters"),
    [
        ("TSB", (1120, 896, 448), 175.04),
        ("SBL", (1120, 672, 448), 547.8),
        ("TSBL", (1344, 896, 672, 448), 571.1),
    ],
)
def test_parameters_of_dense_backbones(letters, sizes, parameters):
    net = meta(partial(dense, letters, sizes, weights=["random"] * len(letters)))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, abs=0.06)
    parts = {"pyramid.branches": 113.02, "pyramid.interactions": 29.72, "merge": 25.22, "fpn": 7.08}
    if letters == "TSB":
        found = {part: sum(p.numel() for name, p in net.named_parameters() if name.startswith(part)) for part in parts}
        assert {part: round(count / 1e6, 2) for part, count in found.items()} == parts


@pytest.mark.parametrize(
    ("coarse", "fine", "speed_up", "parameters"),
    [
        (384, 192, False, 543_120),
        (768, 384, False, 1_933_728),
        (1024, 768, False, 4_400_448),
        (1024, 768, True, 2_782_272),
    ],
)
def test_parameters_of_units(coarse, fine, speed_up, parameters):
    unit = meta(partial(InteractionUnit, coarse, fine, speed_up=speed_up))
    assert sum(p.numel() for p in unit.parameters()) == parameters


@pytest.mark.parametrize(
    ("letters", "sizes", "window", "closed", "published"),
    [
        ("TSB", (1120, 896, 448), 14, 242.6, 243),
        ("TSB", (1568, 896, 448), 14, 286.0, 287),
        ("TSB", (1568, 1120, 672), 14, 452.4, 453),
        ("SBL", (1120, 672, 448), 28, 725.9, 727),
        ("SBL", (1344, 896, 448), 28, 1000.7, 1002),
        ("SBL", (1568, 896, 672), 28, 1462.1, 1464),
        ("TSBL", (1344, 896, 672, 448), 28, 753.7, 755),
        ("TSBL", (1568, 1120, 672, 448), 28, 859.8, 861),
        ("TSBL", (1792, 1568, 1120, 448), 28, 1532.5, 1535),
    ],
)
def test_closed_form(letters, sizes, window, closed, published):
    found = pyramid_operations(shapes(letters, sizes, window)) / 1e9
    assert found == pytest.approx(closed, abs=0.06)
    assert found == pytest.approx(published, rel=0.01)


def test_closed_form_of_single_models_and_two_branches():
    assert vit_operations(Shape(768, 12, 1024, 14, 8)) / 1e9 == pytest.approx(463.3, abs=0.06)
    assert vit_operations(Shape(1024, 24, 1024, 14, 16)) / 1e9 == pytest.approx(1541.4, abs=0.06)
    assert vit_operations(Shape(3200, 48, 1024)) / 1e9 == pytest.approx(29323.2, abs=0.06)
    found = pyramid_operations(shapes(["H", "6B"], (1024, 512)), light_merge=False) / 1e9
    assert found == pytest.approx(11061, abs=0.6)
    assert found == pytest.approx(11080, rel=0.01)
    for sizes, interactions, published in (((512, 448), 12, 422), ((512, 256), 2, 193)):
        found = pyramid_operations(shapes("BL", sizes), interactions, light_merge=False) / 1e9
        assert found == pytest.approx(published, rel=0.01)


def test_inverted_is_cheaper_than_reversed():
    sizes = (1120, 896, 448)
    inverted, reversed_, big = (
        pyramid_operations(shapes(letters, sizes), light_merge=False) / 1e9 for letters in ("TSB", "BST", "BBB")
    )
    assert inverted < reversed_ < big


@pytest.mark.parametrize("speed_up", [False, True])
def test_closed_form_is_what_is_counted(speed_up):
    branches = [
        VitBranch("deit_tiny_patch16_224", size, 2, "random", embed_dim=dim, depth=2, num_heads=2)
        for dim, size in ((96, 64), (32, 128))
    ]
    net = PiipClassifier(branches, 5, partial(InteractionUnit, speed_up=speed_up), head="merged").eval().to("meta")
    part = counted(net, (128, 128), ["pyramid.interactions."])["pyramid.interactions."]
    coarse, fine = Shape(96, 2, 64), Shape(32, 2, 128)
    tokens = coarse.tokens * 96 + fine.tokens * 32
    others = tokens // 4  # biases of the depthwise convolutions
    if not speed_up:
        others += 4 * tokens + 2 * (fine.tokens * 96 + coarse.tokens * 32)  # norms of what asks and of what is read
    assert part.operations == 2 * (unit_operations(coarse, fine, speed_up=speed_up) + others)
