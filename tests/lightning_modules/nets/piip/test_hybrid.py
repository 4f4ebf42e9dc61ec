"""Backbones of ConvNeXts and vision transformers."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.convnext import ConvNextBranch
from penstock.lightning_modules.nets.piip.flops import counted
from penstock.lightning_modules.nets.piip.hybrid import PiipHybridBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.vit import VitBranch

DIMS = {"T": (32, 32, 64, 96), "B": (64, 96, 128, 160)}
UNIT = partial(InteractionUnit, heads=8)


def cnn(letter: str, size: int, groups=(1, 2, 2, 2), dims=None) -> ConvNextBranch:
    shape = {"depths": (1, 1, 1, 1), "embed_dims": dims or DIMS[letter]}
    return ConvNextBranch("convnext_tiny", size, groups, "random", in_chans=1, **shape)


def vit(dim: int, size: int, groups: int = 4) -> VitBranch:
    shape = {"embed_dim": dim, "depth": groups, "num_heads": 2, "in_chans": 1}
    return VitBranch("vit_tiny_patch16_224", size, groups, "random", **shape)


def hybrid(*branches, after=(0, 1, 2)) -> PiipHybridBackbone:
    return PiipHybridBackbone(branches, after, UNIT)


def disturbed(net: nn.Module) -> nn.Module:
    """In double precision, all parameters elsewhere than they start."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else parameter.data.add_(torch.randn_like(parameter))
    return net.double().eval()


MAKERS = {
    "CNN, CNN": lambda: hybrid(cnn("B", 64), cnn("T", 128)),
    "CNN, ViT, CNN": lambda: hybrid(cnn("B", 32), vit(64, 64), cnn("T", 128)),
    "ViT, CNN": lambda: hybrid(vit(96, 64), cnn("T", 128)),
    "CNN, ViT": lambda: hybrid(cnn("B", 64), vit(32, 128)),
    "ViT, CNN, ViT": lambda: hybrid(vit(96, 64), cnn("T", 96), vit(32, 128)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_maps(name):
    net = MAKERS[name]().eval()
    channels = [96] * 4 if name.startswith("ViT") else list(DIMS["B"])
    assert net.channels == channels
    for height, width in ((128, 128), (128, 192)):
        maps = net(torch.rand(1, 1, height, width))
        assert [x.shape[1:] for x in maps] == [(d, height // s, width // s) for d, s in zip(channels, (4, 8, 16, 32))]


def test_maps_of_a_convnext_have_its_grids():
    maps = hybrid(cnn("B", 64), cnn("T", 128))(torch.rand(1, 1, 150, 205))
    assert [tuple(x.shape[2:]) for x in maps] == [(37, 51), (18, 25), (9, 12), (4, 6)]


def merged(net: PiipHybridBackbone, image: torch.Tensor) -> list[torch.Tensor]:
    """Sums of projected, enlarged maps as arXiv 2501.07783 has them."""
    found = []
    merges = [net.merges["0"], net.merges["1"], net.merges["2"], net.merge]
    for merge, states in zip(merges, net.pyramid(image, (0, 1, 2, 3))):
        total = 0
        for i, (state, parts, weight) in enumerate(zip(states, merge.projections, merge.weights)):
            x = state.tokens.transpose(1, 2).reshape(len(image), -1, *state.grid)
            if i:
                x = F.conv2d(x, parts[0].weight, padding=1)
            norm = parts[i > 0]
            groups = x.reshape(len(x), 32, -1)
            groups = groups - groups.mean(2, keepdim=True)
            x = (groups / (groups.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
            x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
            total = total + weight * F.interpolate(x, size=states[-1].grid, mode="bilinear", align_corners=False)
        found.append(total)
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_merging(name):
    torch.manual_seed(0)
    net = disturbed(MAKERS[name]())
    image = torch.rand(2, 1, 128, 160, dtype=torch.float64)
    expected = merged(net, image)
    if net.fpn is not None:
        quarter, eighth = net.fpn.quarter, net.fpn.eighth
        first = F.gelu(quarter[1](F.conv_transpose2d(expected[0], quarter[0].weight, quarter[0].bias, stride=2)))
        expected[0] = F.conv_transpose2d(first, quarter[3].weight, quarter[3].bias, stride=2)
        expected[1] = F.conv_transpose2d(expected[1], eighth.weight, eighth.bias, stride=2)
        expected[3] = F.max_pool2d(expected[3], 2)
    assert (net.fpn is None) == name.endswith("CNN")
    for x, y in zip(net(image), expected, strict=True):
        assert (x - y).abs().max() < 1e-10 * y.abs().max()


def test_each_map_has_scalars_of_its_own():
    net = hybrid(cnn("B", 64), cnn("T", 128))
    image = torch.rand(1, 1, 128, 128)
    scalars = [*net.merges["1"].weights, *net.merges["2"].weights, *net.merge.weights, *net.merges["0"].weights]
    assert [weight.item() for weight in scalars] == [1.0] * 8
    before = net.eval()(image)
    nn.init.zeros_(net.merges["1"].weights[0])
    assert [torch.equal(x, y) for x, y in zip(before, net(image))] == [True, False, True, True]


@pytest.mark.parametrize(
    ("letters", "published"),
    [("CCC", 326), ("VCV", 291), ("VVC", 193)],
)
def test_published_operations(letters, published):
    """GFLOPs of arXiv 2501.07783's hybrids; the authors stop before the maps are resampled."""
    models = {"C": ("convnext_tiny", "convnext_small", "convnext_base")}
    models["V"] = ("deit_tiny_patch16_224", "deit3_small_patch16_224", "deit3_base_patch16_224")
    with torch.device("meta"):
        branches = [
            ConvNextBranch(models[letter][i], size, weights="random")
            if letter == "C"
            else VitBranch(models[letter][i], size, 12, "random", window=14)
            for i, (letter, size) in enumerate(zip(letters, (1024, 672, 448)))
        ]
        net = PiipHybridBackbone(branches[::-1])
    parts = counted(net.eval(), (1024, 1024), ["fpn."])
    assert net.channels == ([128, 256, 512, 1024] if letters.endswith("C") else [768] * 4)
    assert parts["others"].operations / 1e9 == pytest.approx(published, rel=0.01)


def test_loading_reaches_the_branches(monkeypatch):
    net, loaded = hybrid(cnn("B", 64), cnn("T", 128)), []
    for i, branch in enumerate(net.pyramid.branches):
        monkeypatch.setattr(branch, "load", partial(loaded.append, i))
    net.load()
    assert loaded == [0, 1]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"after: found \[0, 1, 3\], expected rising numbers from 0 to 2", lambda: pair(after=(0, 1, 3))),
        (r"after: found \[1, 0, 2\], expected rising numbers", lambda: pair(after=(1, 0, 2))),
        (r"after: found \[-1, 1, 2\], expected rising numbers", lambda: pair(after=(-1, 1, 2))),
        (
            r"after: found \[0, 2\], where cells of the finest branch have \[4, 16\] pixels, and at last 32; "
            r"expected \[4, 8, 16, 32\] or four times 16, such as after \[0, 1, 2\]$",
            lambda: pair(after=(0, 2)),
        ),
        (
            r"after: found \[0, 1\], .* \[16, 16\] pixels, and at last 16; .* such as after \[0, 1, 2\]$",
            lambda: hybrid(cnn("B", 64), vit(32, 128), after=(0, 1)),
        ),
        (
            r"after: found \[0, 1, 2\], .* \[8, 8, 16\] pixels, and at last 32; expected .* four times 16$",
            lambda: hybrid(cnn("B", 64), cnn("T", 128, (2, 1, 2, 2))),
        ),
        (
            r"found 48 channels to merge, expected a multiple of 32, such as 64",
            lambda: hybrid(cnn("B", 64, dims=(48, 96, 128, 160)), cnn("T", 128)),
        ),
        (r"branches: found \[4, 3\] groups", lambda: hybrid(cnn("B", 64), vit(32, 128, 3))),
    ],
)
def test_refused(message, make):
    with pytest.raises(UserError, match=message):
        make()


def pair(**kwargs) -> PiipHybridBackbone:
    return hybrid(cnn("B", 64), cnn("T", 128), **kwargs)
