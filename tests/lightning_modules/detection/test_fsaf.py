"""FSAF against the official code's numbers, both orders of overlapping objects, and in closed form."""

import pytest
import torch
from torch import Tensor

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.assignment import IGNORED
from penstock.lightning_modules.detection.coding import Distances
from penstock.lightning_modules.detection.fsaf import Fsaf, by_region, iou_loss
from penstock.lightning_modules.detection.host import Objects, Outputs
from penstock.lightning_modules.detection.selection import Selection
from tests.detection_files import images, in_order, maps
from tests.golden_files import Record


def fsaf(classes: int = 4, legacy: bool = True, **options) -> Fsaf:
    anchors = Anchors(scales=(1.0,), ratios=(1.0,), legacy=legacy)
    return Fsaf(classes, anchors, Distances(anchors.extent), **options)


@pytest.mark.parametrize("prefix", ["", "rankfix_"])
def test_golden(prefix):
    record = Record(
        "sepc", "12", prefix + "(labels|label_weights|bbox_targets|gt_index|level_table|loss|grad)", torch.float32
    )
    host, outputs = fsaf(official=not prefix), maps(record)
    objects, _, padded, _ = images(record)
    levels = [len(p) for p in host.priors(outputs.logits)]
    priors = torch.cat(host.priors(outputs.logits))
    for level, part in enumerate(priors.split(levels)):
        record.same(part, f"priors{level}")
    terms = host.terms(outputs, objects, padded)

    def levelled(name: str, value: Tensor) -> None:
        for level, part in enumerate(value.split(levels, 1)):
            record.same(part, f"{prefix}{name}{level}")

    positive, own = terms.owners >= 0, terms.owners.clamp(min=0)
    levelled("gt_index", terms.owners.where(positive, -1))
    labels = torch.stack([one.labels[rows] for one, rows in zip(objects, own)])
    levelled("labels", torch.where(positive, labels + 1, 0))
    levelled("label_weights", terms.owners > IGNORED)
    aims = torch.stack([host.coding.encode(priors, one.boxes[rows]) for one, rows in zip(objects, own)])
    levelled("bbox_targets", torch.where(positive[:, :, None], aims, 0))
    record.same(terms.table, prefix + "level_table")
    count = terms.kept.sum()
    assert float(count) / len(objects) == float(record.out[prefix + "num_pos"])
    for name, values in (("loss_cls", terms.classes.sum(2)), ("loss_bbox", terms.boxes)):
        record.same(torch.stack([part.sum() for part in values.split(levels, 1)]) / count, prefix + name)
    sum(host.losses(outputs, objects, padded).values()).backward()
    for level in range(5):
        record.same(outputs.codes[level].grad, f"{prefix}grad_reg{level}")
        record.same(outputs.logits[level].grad, f"{prefix}grad_cls{level}")
    assert not record.left


def test_golden_detections():
    record = Record("sepc", "12", "det", torch.float32)
    host, outputs = fsaf(selection=Selection(100, 0.1, 0.5, 30)), maps(record)
    _, sizes, _, scales = images(record)
    for image, (boxes, scores, labels, _) in enumerate(host.detections(outputs, sizes, scales)):
        expected = in_order(record.out[f"det_boxes{image}"], record.out[f"det_labels{image}"])
        found = in_order(torch.cat([boxes, scores[:, None]], 1), labels)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("extent", [0.0, 1.0])
def test_round_trip(extent):
    generator = torch.Generator().manual_seed(0)
    priors, boxes = (torch.rand(50, 4, generator=generator, dtype=torch.float64) * 50 for _ in range(2))
    for x in (priors, boxes):
        x[:, 2:] += x[:, :2] + 1
    coding = Distances(extent)
    torch.testing.assert_close(coding.decode(priors, coding.encode(priors, boxes)), boxes, rtol=0, atol=1e-10)


def test_the_smallest_of_several_objects_has_a_cell():
    priors = torch.tensor([[8.0, 8, 16, 16], [0.0, 0, 8, 8]])
    boxes = torch.tensor([[4.0, 4, 20, 20], [0.0, 0, 24, 24], [8.0, 8, 16, 16]])
    found = by_region(priors, boxes, torch.tensor([True, True]), Distances())
    assert found.tolist() == [2, -1]
    assert by_region(priors, boxes, torch.tensor([False, True]), Distances()).tolist() == [IGNORED, -1]


def test_iou_of_distances():
    found = torch.tensor([[1.0, 1, 1, 1], [2.0, 0, 2, 0]])
    aims = torch.tensor([[2.0, 2, 2, 2], [1.0, 1, 1, 1]])
    expected = torch.tensor([4 / 16, 1 / 7]).log().neg()
    torch.testing.assert_close(iou_loss(found, aims), expected)


def test_images_without_objects():
    host = fsaf(2, legacy=False)
    logits = [torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 2, 2, 2, requires_grad=True)]
    codes = [torch.ones(1, 4, 4, 4, requires_grad=True), torch.ones(1, 4, 2, 2, requires_grad=True)]
    none = Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    found = host.losses(Outputs(logits, codes), [none], [(32, 32)])
    sum(found.values()).backward()
    assert float(found["box"].detach()) == 0
    assert logits[0].grad.min() > 0
