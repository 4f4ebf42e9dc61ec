"""What makes FastFlow quick changes nothing: folded norms, flows with fewer operators, images in parts."""

import copy

import pytest
import torch
from torch import nn

from penstock.lightning_modules.flow.anomaly_map import anomaly_map, image_score
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import CouplingFlow
from penstock.lightning_modules.nets.folded_flow import FoldedFlow


def stirred(model: str, **options) -> Backbone:
    """A random backbone with norms that do something."""
    torch.manual_seed(0)
    backbone = Backbone(model, weights="random", **options)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            for x in (module.running_mean, module.bias):
                x.normal_(0, 0.3)
            for x in (module.running_var, module.weight):
                x.uniform_(0.5, 1.5)
    return backbone


def plain(backbone: Backbone, image: torch.Tensor) -> list[torch.Tensor]:
    """Maps by the network as timm has it, all images at once."""
    x = (image * 0.5 + 0.5 - backbone.mean) / backbone.std
    options = {"norm": True} if backbone.norm else {}
    with torch.no_grad():
        return backbone.net.forward_intermediates(
            x, indices=backbone.layers, stop_early=True, intermediates_only=True, **options
        )


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(
    ("model", "options", "left"),
    [
        ("mobilenetv2_035", {}, 0),
        ("mobilenetv2_035", {"pad_type": "same"}, 0),
        ("resnet18", {}, 0),
        ("resnetv2_18", {}, None),
        ("densenet121", {"layers": [1, 2]}, None),
        ("test_vit", {"layers": [1], "norm": True, "image_size": 32}, 0),
    ],
)
def test_maps_are_those_of_the_network(model, options, left):
    backbone = stirred(model, **options)
    before = copy.deepcopy(backbone.state_dict())
    image = torch.rand(6, 3, 32, 32) * 2 - 1
    same(backbone(image), plain(backbone, image))
    same(backbone.folded(image[:1])((image + 1) / 2), plain(backbone, image))
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in backbone.folded(image[:1]).modules())
    assert norms == left or left is None
    assert backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_other_weights_are_folded_anew():
    backbone, other = stirred("mobilenetv2_035"), stirred("mobilenetv2_035")
    other.net.conv_stem.weight.mul_(2)
    image = torch.rand(1, 3, 32, 32)
    first = backbone(image)
    kept = backbone._quick[1]
    backbone(image)
    assert backbone._quick[1] is kept
    for load in (
        lambda: backbone.load_state_dict(other.state_dict()),
        lambda: backbone.net.bn1.running_mean.add_(1),
        lambda: backbone.load_state_dict(other.state_dict(), assign=True),
        lambda: backbone.double().float(),
    ):
        load()
        assert not torch.equal(backbone(image)[0], first[0])
        same(backbone(image), plain(backbone, image))
    twin = copy.deepcopy(backbone)
    twin.net.conv_stem.weight.mul_(3)
    same(twin(image), plain(twin, image))
    same(backbone(image), plain(backbone, image))
    image = image.double()
    assert backbone.double()(image)[0].dtype == torch.float64


def test_a_convolution_used_twice_keeps_its_norms():
    from penstock.lightning_modules.nets.batch_norm_folding import folded

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.two(self.conv(self.one(self.conv(x))))

    net, x = Twice().eval(), torch.randn(1, 3, 4, 4)
    net.one.running_mean.normal_()
    net.two.running_mean.normal_()
    made = folded(net, lambda: net(x))
    assert torch.equal(made(x), net(x))
    assert isinstance(made.one, nn.BatchNorm2d)


def test_folded_during_validation_for_training_and_export():
    backbone, image = stirred("mobilenetv2_035"), torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        backbone(image)
    assert not any(p.is_inference() for p in backbone._quick[1].parameters())
    weight = torch.ones(1, requires_grad=True)
    (backbone(image)[0] * weight).square().sum().backward()
    assert weight.grad > 0
    program = torch.export.export(backbone.folded(image), (image,))
    same([y.contiguous() for y in program.module()(image)], backbone.folded(image)(image))


@pytest.mark.parametrize("form", ["tanh", "tanh_over_clamp"])
@pytest.mark.parametrize("channels", [7, 24])
def test_folded_flow_is_the_flow(channels, form):
    torch.manual_seed(0)
    flow = CouplingFlow(channels, 4, clamp=1.5, form=form, hidden_ratio=1.3).double()
    for step in flow.steps:
        nn.init.normal_(step.global_scale, 10, 3)
        nn.init.normal_(step.global_offset)
        for layer in (step.subnet[0], step.subnet[2]):
            layer.weight.data *= 5
    y = torch.randn(2, channels, 6, 5)
    expected = flow(y.double())[0]
    found = FoldedFlow(flow)(y)
    torch.testing.assert_close(found.double(), expected.square().mean(1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in FoldedFlow(flow).parameters())


def test_maps_from_the_means():
    from penstock.lightning_modules.flow.anomaly_map import map_of_means

    z = [torch.randn(2, c, s, s) for c, s in ((4, 8), (6, 4))]
    means = [x.square().mean(1, keepdim=True) for x in z]
    assert torch.equal(map_of_means(means, (16, 12)), anomaly_map(z, (16, 12)))
    assert image_score(map_of_means(means, (16, 12))).shape == (2,)
