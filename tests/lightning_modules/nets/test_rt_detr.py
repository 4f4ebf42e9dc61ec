"""RT-DETR on our backbones: transformers' own losses and boxes, and what trains."""

import pytest
import torch

from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.tiny import tiny_backbone
from penstock.lightning_modules.nets.rt_detr import RtDetrDetector

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra detr)")
SIZES = [(128, 160), (96, 128)]


def detector() -> RtDetrDetector:
    torch.manual_seed(0)
    backbone = tiny_backbone([64, 128], [64, 32], depth=2, maps=3)
    return RtDetrDetector(backbone, 3, channels=32, queries=20, layers=2, hidden=32, denoising=10, most=15)


def objects() -> list[Objects]:
    boxes = torch.tensor([[10.0, 12, 60, 70], [50, 20, 90, 60]])
    return [Objects(boxes, torch.tensor([0, 2])), Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))]


def test_losses_are_transformers_and_reach_all_that_trains():
    net, image = detector().train(), torch.rand(2, 3, 128, 160) * 2 - 1
    assert net.backbone.channels == [64] * 3
    torch.manual_seed(1)
    losses = net.losses(image, objects(), SIZES)
    assert set(losses) == {"class", "box", "giou"}
    torch.manual_seed(1)
    centres = torch.tensor([[35 / 160, 41 / 128, 50 / 160, 58 / 128], [70 / 160, 40 / 128, 40 / 160, 40 / 128]])
    targets = [
        {"class_labels": torch.tensor([0, 2]), "boxes": centres},
        {"class_labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4)},
    ]
    torch.testing.assert_close(sum(losses.values()), net.net(pixel_values=image, labels=targets).loss)
    sum(losses.values()).backward()
    gates = ("cls_token", "pos_embed")
    assert not {name for name, p in net.named_parameters() if p.grad is None and not name.endswith(gates)}


@torch.no_grad()
def test_boxes_are_transformers():
    """Their processing of images of one size, which is that of the batch."""
    net, image = detector().eval(), torch.rand(2, 3, 128, 160) * 2 - 1
    found = net.detections(image, [(128, 160)] * 2, torch.tensor([[2.0] * 4, [1.0] * 4]))
    processor = transformers.RTDetrImageProcessor()
    expected = processor.post_process_object_detection(
        net.net(pixel_values=image), threshold=0.0, target_sizes=[(128, 160)] * 2
    )
    for one, other, scale in zip(found, expected, (2, 1)):
        assert len(one.boxes) == 15
        torch.testing.assert_close(one.scores, other["scores"][:15])
        assert torch.equal(one.labels, other["labels"][:15])
        edges = torch.tensor([160.0, 128, 160, 128])
        torch.testing.assert_close(one.boxes * scale, torch.minimum(other["boxes"][:15].clamp(min=0), edges))
    (first, second) = net.detections(image, SIZES, torch.ones(2, 4))
    assert first.boxes[:, 2].max() > 128
    assert second.boxes[:, 2].max() <= 128


def test_what_does_not_fit():
    with pytest.raises(UserError, match=r"net\.channels: found 30, expected a multiple of 8"):
        RtDetrDetector(tiny_backbone([64, 128], [64, 32], depth=2), 3, channels=30)
    with pytest.raises(
        UserError, match=r"data\.pad_multiple: found a batch of 160x120 pixels, expected multiples of 32"
    ):
        detector().detections(torch.rand(1, 3, 120, 160), [(120, 160)], torch.ones(1, 4))
