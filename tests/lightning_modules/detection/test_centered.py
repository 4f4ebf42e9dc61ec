"""FCOS and ATSS: assignment object by object, torchvision's FCOS, and closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.ops import box_iou

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.centered import ByDistance, ByStatistics, Centered, centerness
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.host import Objects, Outputs
from penstock.lightning_modules.detection.selection import Selection

SIZES = [(16, 20), (8, 10), (4, 5)]
STRIDES = (8, 16, 32)


def boxes(n: int, seed: int = 0, width: float = 160, height: float = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 2, generator=generator) * torch.tensor([width * 0.7, height * 0.7])
    side = 6 + torch.rand(n, 2, generator=generator) ** 2 * 80
    return torch.cat([low, torch.minimum(low + side, torch.tensor([width, height]))], 1)


def fcos(classes: int = 3) -> Centered:
    return Centered(classes, Anchors(STRIDES, (1.0,), (1.0,)), Distances(), ByDistance())


def atss(classes: int = 3) -> Centered:
    coding = Deltas((0.1, 0.1, 0.2, 0.2))
    return Centered(classes, Anchors(STRIDES, (8.0,), (1.0,)), coding, ByStatistics(), box_weight=2.0)


def outputs(classes: int = 3, batch: int = 2) -> Outputs:
    generator = torch.Generator().manual_seed(3)

    def maps(channels: int) -> list[Tensor]:
        return [torch.randn(batch, channels, *size, generator=generator).requires_grad_() for size in SIZES]

    return Outputs(maps(classes), maps(4), maps(1))


def test_fcos_assigns_as_torchvision_does():
    """Its own loss is given predictions that tell which object every cell was matched with."""
    targets = [{"boxes": boxes(7, seed), "labels": torch.arange(7)} for seed in (1, 2)]
    priors = fcos().anchors.grid(SIZES)
    model = FCOS.__new__(FCOS)
    torch.nn.Module.__init__(model)
    model.center_sampling_radius, seen = 1.5, []
    model.anchor_generator = AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * 3)
    model.head = type("Head", (), {"compute_loss": staticmethod(lambda t, h, a, matched: seen.extend(matched))})()
    model.compute_loss(targets, {}, [torch.cat(priors)] * 2, [len(p) for p in priors])
    for target, expected in zip(targets, seen):
        found = ByDistance()(priors, target["boxes"])
        assert torch.equal(found, expected)
        assert (found >= 0).sum() > 7


def test_atss_assigns_object_by_object():
    own, priors = boxes(6, 5), atss().anchors.grid(SIZES)
    anchors = torch.cat(priors)
    expected, best = torch.full((len(anchors),), -1), torch.full((len(anchors),), -math.inf)
    for number, box in enumerate(own):
        candidates, first = [], 0
        for level in priors:
            middle = (level[:, :2] + level[:, 2:]) / 2
            away = (middle - (box[:2] + box[2:]) / 2).square().sum(1)
            candidates += (first + away.argsort()[:9]).tolist()
            first += len(level)
        overlaps = box_iou(anchors[candidates], box[None])[:, 0]
        limit = overlaps.mean() + overlaps.std()
        for anchor, overlap in zip(candidates, overlaps):
            x, y = (anchors[anchor, :2] + anchors[anchor, 2:]) / 2
            within = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= limit and within and overlap > best[anchor]:
                expected[anchor], best[anchor] = number, overlap
    assert torch.equal(ByStatistics()(priors, own), expected)
    assert (expected >= 0).sum() > 6


def test_centerness():
    box = torch.tensor([0.0, 0, 10, 20])
    points = torch.tensor([[5.0, 10], [0, 10], [2.5, 10], [2.5, 5]])
    torch.testing.assert_close(centerness(points, box), torch.tensor([1, 0, math.sqrt(1 / 3), 1 / 3]))


@pytest.mark.parametrize("host", [fcos(), atss()], ids=["fcos", "atss"])
def test_perfect_boxes_cost_nothing(host):
    """And the centre-ness costs the entropy of its aims, the classes nearly nothing."""
    objects = [Objects(boxes(5, seed), torch.arange(5) % 3) for seed in (1, 2)]
    priors = torch.cat(host.priors(outputs().logits))
    logits, codes = torch.full((2, len(priors), 3), -20.0), torch.zeros(2, len(priors), 4)
    quality = torch.zeros(2, len(priors), 1)
    for image, one in enumerate(objects):
        owners = host.owners(outputs(), one, (128, 160))
        at = (owners >= 0).nonzero().squeeze(1)
        own = owners[at]
        logits[image, at, one.labels[own]] = 20
        codes[image, at] = host.coding.encode(priors[at], one.boxes[own])
        middle = (priors[at, :2] + priors[at, 2:]) / 2
        quality[image, at, 0] = centerness(middle, one.boxes[own]).clamp(1e-6, 1 - 1e-6).logit()

    def maps(rows: Tensor) -> list[Tensor]:
        parts = rows.split([h * w for h, w in SIZES], 1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, SIZES)]

    found = host.losses(Outputs(maps(logits), maps(codes), maps(quality)), objects, [(128, 160)] * 2)
    assert float(found["class"]) < 1e-6
    assert float(found["box"]) == pytest.approx(0, abs=1e-5)
    assert 0 < float(found["quality"]) < math.log(2)
    worse = host.losses(Outputs(maps(logits), maps(codes), maps(-quality)), objects, [(128, 160)] * 2)
    assert worse["quality"] > found["quality"]
    best = host.detections(Outputs(maps(logits), maps(codes), maps(quality)), [(128, 160)] * 2)
    for one, given in zip(best, objects):
        overlaps = box_iou(given.boxes, one.boxes).amax(1)
        assert overlaps.min() > 0.99


@pytest.mark.parametrize("host", [fcos(), atss()], ids=["fcos", "atss"])
def test_images_without_objects_and_gradients(host):
    given = outputs()
    none = Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    found = host.losses(given, [none, none], [(128, 160)] * 2)
    assert float(found["box"].detach()) == float(found["quality"].detach()) == 0
    found = host.losses(given, [none, Objects(boxes(3), torch.tensor([0, 1, 2]))], [(128, 160)] * 2)
    sum(found.values()).backward()
    assert all(torch.isfinite(y.grad).all() for maps in given for y in maps)
    assert given.codes[0].grad[1].any()
    assert not given.codes[0].grad[0].any()


@pytest.mark.parametrize("host", [fcos(), atss()], ids=["fcos", "atss"])
def test_the_threshold_is_on_the_probability_alone(host):
    """Cell by cell: a box is there where its class is sure enough, however badly it fits, and its score is the mean."""
    given = outputs()
    host.selection = Selection(score=0.5, overlap=1.0, most=10**6)
    p, fit = (
        torch.cat([y.detach().permute(0, 2, 3, 1).flatten(1, 2) for y in maps], 1).sigmoid()
        for maps in (given.logits, given.quality)
    )
    for image, found in enumerate(host.detections(given, [(128, 160)] * 2)):
        expected = [
            (math.sqrt(float(p[image, cell, label] * fit[image, cell])), label)
            for cell in range(p.shape[1])
            for label in range(3)
            if p[image, cell, label] > 0.5
        ]
        expected.sort(reverse=True)
        assert len(found.scores) == len(expected) > 100
        torch.testing.assert_close(found.scores, torch.tensor([score for score, _ in expected]))
        assert sorted(found.labels.tolist()) == sorted(label for _, label in expected)
        assert found.scores.min() < 0.45


def test_priors_in_padding_are_left_out():
    host, one = fcos(), Objects(boxes(3), torch.tensor([0, 1, 2]))
    owners = host.owners(outputs(), one, (64, 80))
    inside = host.anchors.inside(SIZES, (64, 80))
    assert (owners[~inside] == -2).all()
    assert int(inside.sum()) == 8 * 10 + 4 * 5 + 2 * 3
