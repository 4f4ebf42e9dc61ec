"""Faster R-CNN with pyramid convolutions: what trains, what comes out, and torchvision's own forward pass."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone
from penstock.lightning_modules.nets.two_stage import TwoStageDetector

SIZES = [(96, 128), (64, 100)]


def detector(layers: int = 2) -> TwoStageDetector:
    torch.manual_seed(0)
    backbone = TrainedBackbone("resnet18", layers=[1, 2, 3, 4], frozen=0, weights="random")
    return TwoStageDetector(backbone, 3, channels=16, layers=layers, ibn=True, deformable=True, hidden=32)


def objects() -> list[Objects]:
    boxes = torch.tensor([[10.0, 12, 60, 70], [50, 20, 90, 60]])
    return [Objects(boxes, torch.tensor([0, 2])), Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))]


class AsTheyAre(nn.Module):
    """In place of torchvision's transform, which resizes."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.images = ImageList(image, SIZES)

    def forward(self, images: list[Tensor], targets: None) -> tuple[ImageList, None]:
        return self.images, targets

    def postprocess(self, result: list[dict[str, Tensor]], *_: object) -> list[dict[str, Tensor]]:
        return result


def test_losses_reach_all_that_trains():
    net = detector().train()
    losses = net.losses(torch.rand(2, 3, 96, 128) * 2 - 1, objects(), SIZES)
    assert set(losses) == {"objectness", "rpn_box_reg", "classifier", "box_reg"}
    sum(losses.values()).backward()
    missing = {name for name, p in net.named_parameters() if p.requires_grad and p.grad is None}
    assert not missing
    assert all(conv.weight.grad.any() for conv in net.net.backbone.Pconvs[1].Pconv)


@torch.no_grad()
def test_boxes_are_torchvisions_divided_by_the_scale():
    net = detector(0).eval()
    net.net.roi_heads.score_thresh = 0.0
    image = torch.rand(2, 3, 96, 128) * 2 - 1
    found = net.detections(image, SIZES, torch.tensor([[2.0] * 4, [1.0] * 4]))
    net.net.transform = AsTheyAre(image)
    for one, expected, scale, (height, width) in zip(found, net.net(list(image)), (2, 1), SIZES):
        torch.testing.assert_close(one.boxes * scale, expected["boxes"])
        torch.testing.assert_close(one.scores, expected["scores"])
        assert torch.equal(one.labels, expected["labels"] - 1)
        assert len(one.boxes) > 0
        assert (one.boxes * scale <= torch.tensor([width, height, width, height])).all()
        assert one.labels.min() >= 0


@pytest.mark.parametrize("layers", [0, 2])
def test_levels(layers):
    maps = detector(layers).net.backbone(torch.rand(1, 3, 96, 128))
    assert [tuple(y.shape[1:]) for y in maps.values()] == [
        (16, 24, 32),
        (16, 12, 16),
        (16, 6, 8),
        (16, 3, 4),
        (16, 2, 2),
    ]


@torch.no_grad()
def test_what_compiles():
    """`net.compile()` reaches what runs: the inner modules, which are called by themselves."""
    graphs = []
    net = detector(1).eval()
    net.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    net.detections(torch.rand(2, 3, 96, 128) * 2 - 1, [(96, 128)] * 2, torch.ones(2, 4))
    assert any(node.op == "call_function" and "conv2d" in str(node.target) for g in graphs for node in g.graph.nodes)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"samples": 1}, r"net\.samples: found 1, expected at least 2"),
        ({"proposals": (0, 5)}, r"net\.proposals: found 0, expected at least 1"),
        ({"layers": -1}, r"net\.layers: found -1, expected at least 0"),
        ({"anchor": 0}, r"net\.anchor: found 0"),
    ],
)
def test_numbers_out_of_range(options, line):
    backbone = TrainedBackbone("resnet18", layers=[1, 2, 3, 4], frozen=0, weights="random")
    with pytest.raises(UserError, match=line):
        TwoStageDetector(backbone, 3, **options)


def test_maps_of_other_strides():
    backbone = TrainedBackbone("resnet18", layers=[2, 3, 4], frozen=0, weights="random")
    with pytest.raises(
        UserError, match=r"found strides \[8, 16, 32\] of maps \[2, 3, 4\] of resnet18, expected four maps"
    ):
        TwoStageDetector(backbone, 3)
