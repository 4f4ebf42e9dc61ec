"""torchvision's RetinaNet on our backbones: anchors, losses and boxes are those of torchvision called by itself."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.nets.torchvision_retinanet import TorchvisionRetinaNet
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone


@pytest.fixture
def net() -> TorchvisionRetinaNet:
    torch.manual_seed(0)
    backbone = TrainedBackbone("resnet18", frozen=0, weights="random")
    found = TorchvisionRetinaNet(backbone, 3, Anchors(scales=(2, 2.5, 3)), channels=16).eval()
    found.net.score_thresh = 0.0
    for conv in (module for module in found.net.head.modules() if isinstance(module, nn.Conv2d)):
        nn.init.normal_(conv.weight, std=(1 / 9 / 16) ** 0.5)
    return found


def images() -> Tensor:
    return torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1


def whole(net: TorchvisionRetinaNet) -> list[Tensor]:
    """What torchvision's user gives: photographs in [0, 1], twice as large as the network sees them."""
    net.net.transform = GeneralizedRCNNTransform(96, 128, [0.5] * 3, [0.5] * 3).train(net.training)
    pixels = [(one[:, :h, :w] + 1) / 2 for one, (h, w) in zip(images(), [(96, 128)] * 2)]
    return [nn.functional.interpolate(one[None], scale_factor=2, mode="nearest-exact")[0] for one in pixels]


@torch.no_grad()
def test_boxes_are_torchvisions_in_the_pixels_of_the_photographs(net):
    found = net.detections(images(), [(96, 128)] * 2, torch.full((2, 4), 0.5))
    assert min(len(one.boxes) for one in found) == 100
    for one, expected in zip(found, net.net(whole(net))):
        torch.testing.assert_close(one.boxes, expected["boxes"], rtol=0, atol=1e-2)
        torch.testing.assert_close(one.scores, expected["scores"], rtol=0, atol=1e-4)
        assert torch.equal(one.labels, expected["labels"])


def test_losses_are_torchvisions_and_reach_all_that_trains(net):
    boxes = torch.tensor([[10.0, 12, 40, 50], [50, 20, 90, 60]])
    objects = [Objects(boxes, torch.tensor([0, 2])), Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))]
    found = net.train().losses(images(), objects, [(96, 128)] * 2)
    sum(found.values()).backward()
    assert not [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    targets = [{"boxes": one.boxes * 2, "labels": one.labels} for one in objects]
    expected = net.net(whole(net), targets)
    torch.testing.assert_close(found["class"], expected["classification"], rtol=1e-4, atol=0)
    torch.testing.assert_close(found["box"], expected["bbox_regression"], rtol=1e-4, atol=0)


def test_anchors_are_ours_in_whole_pixels(net):
    maps = [torch.zeros(1, 1, 96 // stride, 128 // stride) for stride in (8, 16, 32)]
    generator, own = net.net.anchor_generator, Anchors(strides=(8, 16, 32), scales=(2, 2.5, 3))
    generator.sizes, generator.cell_anchors = generator.sizes[:3], generator.cell_anchors[:3]
    (found,) = generator(ImageList(torch.zeros(1, 3, 96, 128), [(96, 128)]), maps)
    ours = torch.cat(own.grid([tuple(x.shape[-2:]) for x in maps])).view(-1, 3, 3, 4)  # ratios, scales
    middle = (found[:, :2] + found[:, 2:]) / 2
    sides = (found[:, 2:] - found[:, :2]).view(-1, 3, 3, 2)
    torch.testing.assert_close(sides, ours[..., 2:] - ours[..., :2], rtol=0, atol=1)
    cells = torch.cat([torch.full((int(x[0, 0].numel()) * 9,), float(s)) for x, s in zip(maps, (8, 16, 32))])
    shift = ((ours[..., :2] + ours[..., 2:]) / 2).view(-1, 2) - middle
    torch.testing.assert_close(shift, (cells / 2)[:, None].expand(-1, 2), rtol=0, atol=0.51)  # theirs lie at corners


@torch.no_grad()
def test_what_compiles(net):
    """`net.compile()` reaches what runs: the inner modules, which are called by themselves."""
    graphs = []
    net.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    net.detections(images(), [(96, 128)] * 2, torch.ones(2, 4))
    assert any(node.op == "call_function" and "conv2d" in str(node.target) for g in graphs for node in g.graph.nodes)
    torch.compiler.reset()
