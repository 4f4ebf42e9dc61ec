"""Mask R-CNN: what trains, torchvision's own model, and masks in the image."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.detection.pasting import pasted
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import decoded
from penstock.lightning_modules.nets.mask_rcnn import MaskDetector
from penstock.lightning_modules.nets.piip.tiny import tiny_backbone
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone

SIZES = [(64, 96), (64, 80)]


def detector() -> MaskDetector:
    torch.manual_seed(0)
    backbone = TrainedBackbone("resnet18", layers=[1, 2, 3, 4], frozen=0, weights="random")
    return MaskDetector(backbone, 3, channels=16, hidden=32)


def objects() -> list[Objects]:
    boxes = torch.tensor([[10.0, 12, 60, 50], [50, 20, 78, 60]])
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 12:50, 10:60] = masks[1, 20:60, 50:78] = 1
    empty = Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), torch.empty(0, 64, 80, dtype=torch.uint8))
    return [Objects(boxes, torch.tensor([0, 2]), masks), empty]


def test_losses_reach_all_that_trains():
    net = detector().train()
    losses = net.losses(torch.rand(2, 3, 64, 96) * 2 - 1, objects(), SIZES)
    assert set(losses) == {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}
    sum(losses.values()).backward()
    assert not {name for name, p in net.named_parameters() if p.requires_grad and p.grad is None}


def test_objects_without_masks():
    with pytest.raises(UserError, match=r"data\.masks: found false, expected true"):
        detector().losses(torch.rand(2, 3, 64, 96), [one._replace(masks=None) for one in objects()], SIZES)


@torch.no_grad()
def test_it_is_torchvisions():
    """The same weights in torchvision's class, which resizes nothing here."""
    net = detector().eval()
    net.net.roi_heads.score_thresh = 0.0
    anchors = AnchorGenerator(tuple((8 * s,) for s in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5)
    theirs = MaskRCNN(
        net.net.backbone,
        min_size=64,
        max_size=96,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=anchors,
        box_head=net.net.roi_heads.box_head,
        box_predictor=net.net.roi_heads.box_predictor,
        box_score_thresh=0.0,
        mask_head=net.net.roi_heads.mask_head,
        mask_predictor=net.net.roi_heads.mask_predictor,
    ).eval()
    theirs.rpn.head.load_state_dict(net.net.rpn.head.state_dict())
    theirs.roi_heads.box_roi_pool, theirs.roi_heads.mask_roi_pool = (
        getattr(net.net.roi_heads, name) for name in ("box_roi_pool", "mask_roi_pool")
    )
    image = torch.rand(1, 3, 64, 96) * 2 - 1
    (found,), (expected,) = net.detections(image, [(64, 96)], torch.ones(1, 4)), theirs(list(image))
    torch.testing.assert_close(found.boxes, expected["boxes"])
    masks = decoded(pasted(found.masks, found.boxes, (64, 96)), (64, 96)).bool()
    assert torch.equal(masks, expected["masks"][:, 0] > 0.5)


def test_a_full_mask_fills_its_box():
    boxes = torch.tensor([[10.0, 20, 50, 60], [0, 0, 30, 30]])
    (first, second) = decoded(pasted(torch.ones(2, 28, 28), boxes, (80, 90)), (80, 90)).bool()
    inside = torch.zeros(80, 90, dtype=torch.bool)
    inside[20:60, 10:50] = True
    ring = F.max_pool2d(inside[None].float(), 3, 1, 1)[0].bool()
    assert (first | ~inside).all()
    assert (ring | ~first).all()
    assert second[:30, :30].all()
    assert pasted(torch.ones(0, 28, 28), boxes[:0], (80, 90)) == []


def test_on_a_pyramid_of_finer_cells():
    """Maps of strides 2 to 16."""
    torch.manual_seed(0)
    backbone = tiny_backbone([32, 64], [64, 32], depth=2, patch=8)
    assert backbone.strides == [2, 4, 8, 16]
    net = MaskDetector(backbone, 3, channels=16, hidden=32, anchor=4).train()
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    sum(net.losses(image, objects(), SIZES).values()).backward()
    assert [tuple(x.shape[2:]) for x in backbone(image)] == [(32, 48), (16, 24), (8, 12), (4, 6)]
