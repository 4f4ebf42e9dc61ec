"""UperNet's heads against another library's, its pooling against loops, and what it asks of backbones."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.vit import VitBranch
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone
from penstock.lightning_modules.nets.upernet import FcnHead, PyramidPooling, SegmentationNet, UperHead

CHANNELS = [4, 6, 8, 10]
UNITS = {
    "pooling.pools.{}.1": "psp_modules.{}.1",
    "pooling.fuse": "bottleneck",
    "lateral.{}": "lateral_convs.{}",
    "smooth.{}": "fpn_convs.{}",
    "fuse": "fpn_bottleneck",
}


def shaken(module: nn.Module) -> nn.Module:
    """With weights and statistics that are none's start."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        nn.init.normal_(value, std=0.4 if "weight" in name else 0.2, generator=generator)
    for name, value in module.named_buffers():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + ("var" in name))
    return module.double()


def unit(ours: str, theirs: str, state: dict) -> dict:
    names = {"0.weight": "conv.weight"} | {
        f"1.{key}": f"batch_norm.{key}" for key in ("weight", "bias", "running_mean", "running_var")
    }
    return {f"{ours}.{own}": state[f"{theirs}.{other}"] for own, other in names.items()}


@pytest.mark.parametrize("training", [False, True])
def test_heads_against_transformers(training):
    library = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    config = library.UperNetConfig(
        hidden_size=6, num_labels=5, auxiliary_channels=7, auxiliary_num_convs=1, auxiliary_concat_input=False
    )
    theirs = [shaken(library.UperNetHead(config, CHANNELS)), shaken(library.UperNetFCNHead(config, CHANNELS))]
    ours = [UperHead(CHANNELS, 6, 5, dropout=0).double(), FcnHead(CHANNELS[2], 7, 5, dropout=0).double()]
    state, auxiliary = (head.state_dict() for head in theirs)
    weights = {f"classify.{key}": state[f"classifier.{key}"] for key in ("weight", "bias")}
    for own, other in UNITS.items():
        for k in range(4 if "pools" in own else 3 if "{" in own else 1):
            weights |= unit(own.format(k), other.format(k), state)
    second = unit("0", "convs.0", auxiliary) | {
        f"2.{key}": auxiliary[f"classifier.{key}"] for key in ("weight", "bias")
    }
    for head, values in zip(ours, (weights, second)):
        missing, unexpected = head.load_state_dict(values, strict=False)
        assert not unexpected
        assert all(name.endswith("num_batches_tracked") for name in missing)
    maps = [torch.randn(2, c, h, w, dtype=torch.float64) for c, h, w in zip(CHANNELS, (20, 10, 5, 3), (28, 14, 7, 4))]
    for head in (*ours, *theirs):
        head.train(training)
    for found, expected in ((ours[0](maps), theirs[0](maps)), (ours[1](maps[2]), theirs[1](maps))):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-10


@pytest.mark.parametrize("size", [(12, 12), (7, 11), (4, 3)])
def test_pooling_against_loops(size):
    """Cell k of n begins at floor(k side / n) and ends at ceil((k + 1) side / n)."""
    pooling = PyramidPooling(3, 2, (1, 2, 3, 6)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    parts = [x]
    for scale, pool in zip((1, 2, 3, 6), pooling.pools):
        means = x.new_zeros(2, 3, scale, scale)
        for i in range(scale):
            for j in range(scale):
                rows, columns = (slice(k * side // scale, -(-(k + 1) * side // scale)) for k, side in zip((i, j), size))
                means[..., i, j] = x[..., rows, columns].mean((2, 3))
        parts.append(F.interpolate(pool[1](means), size=size, mode="bilinear", align_corners=False))
    assert (pooling(x) - pooling.fuse(torch.cat(parts, 1))).abs().max() < 1e-12


def pyramid() -> PiipBackbone:
    own = {"groups": 1, "depth": 1, "num_heads": 2, "weights": "random", "resize_table": True}
    branches = [VitBranch("deit_tiny_patch16_224", size, embed_dim=dim, **own) for size, dim in ((64, 64), (128, 32))]
    return PiipBackbone(branches)


@pytest.mark.parametrize("kind", ["pyramid", "resnet"])
def test_on_backbones(kind):
    backbone = pyramid() if kind == "pyramid" else TrainedBackbone("resnet18", [1, 2, 3, 4], -1, False, "random")
    net = SegmentationNet(backbone, 7, channels=8, auxiliary_channels=8)
    image = torch.randn(2, 3, 128, 128)
    scores, auxiliary = net.train()(image)
    assert (scores.shape, auxiliary.shape) == ((2, 7, 32, 32), (2, 7, 8, 8))
    (scores.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None for p in net.head.parameters())
    assert len(net.eval()(image)) == 1
    assert len(SegmentationNet(backbone, 7, 8, None).train()(image)) == 1


def test_other_maps_are_refused():
    with pytest.raises(UserError, match=r"strides \[4, 8, 16\], of maps \[1, 2, 3\] of resnet18; expected four"):
        SegmentationNet(TrainedBackbone("resnet18", [1, 2, 3], weights="random"), 7)
    with pytest.raises(UserError, match=r"net\.num_classes: found 256, expected 2 to 255"):
        SegmentationNet(pyramid(), 256)
