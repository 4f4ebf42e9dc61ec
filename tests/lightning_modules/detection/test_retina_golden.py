"""RetinaNet's anchors, targets, losses and boxes against the official code's numbers (legacy pixel convention)."""

import pytest
import torch

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.assignment import IGNORED
from penstock.lightning_modules.detection.coding import Deltas
from penstock.lightning_modules.detection.host import rows_of, sizes_of
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.detection.selection import Selection
from tests.detection_files import images, in_order, maps
from tests.golden_files import Record

CLASSES = 4


@pytest.fixture
def record() -> Record:
    return Record("sepc", "10", dtype=torch.float32)


def retina(**options) -> Retina:
    return Retina(CLASSES, Anchors(legacy=True), Deltas(extent=1.0), **options)


def test_anchors(record):
    anchors, outputs = retina().anchors, maps(record)
    sizes = sizes_of(outputs.logits)
    for level, (stride, grid) in enumerate(zip(anchors.strides, anchors.grid(sizes))):
        record.same(anchors.base(stride), f"base_anchors{level}")
        record.same(grid, f"anchors{level}")
    _, _, padded, _ = images(record)
    record.same(torch.stack([anchors.inside(sizes, one) for one in padded]), "valid")


def test_targets(record):
    host, outputs = retina(), maps(record)
    objects, _, padded, _ = images(record)
    levels = [len(grid) for grid in host.priors(outputs.logits)]
    anchors = torch.cat(host.priors(outputs.logits))
    labels, weights, aims, positives = [], [], [], []
    for one, shape in zip(objects, padded):
        owner = host.owners(anchors, one, sizes_of(outputs.logits), shape)
        at = owner >= 0
        labels.append(torch.where(at, one.labels[owner.clamp(min=0)] + 1, 0))
        weights.append(owner > IGNORED)
        aims.append(torch.where(at[:, None], host.coding.encode(anchors, one.boxes[owner.clamp(min=0)]), 0))
        positives.append(at)
    for name, found in (
        ("labels", labels),
        ("label_weights", weights),
        ("bbox_targets", aims),
        ("bbox_weights", positives),
    ):
        for level, part in enumerate(torch.stack(found).split(levels, 1)):
            record.same(part, f"{name}{level}")
    assert int(torch.stack(positives).sum()) == int(record.out["num_total_pos"])


def test_losses_and_gradients(record):
    host, outputs = retina(), maps(record)
    objects, _, padded, _ = images(record)
    levels = [len(grid) for grid in host.priors(outputs.logits)]
    for name, terms in zip(("loss_cls", "loss_bbox"), host.terms(outputs, objects, padded)):
        record.same(torch.stack([part.sum() for part in terms.split(levels, 1)]), name)
    sum(host.losses(outputs, objects, padded).values()).backward()
    for level in range(5):
        record.same(outputs.codes[level].grad, f"grad_reg{level}")
        if f"grad_cls{level}" in record.out:
            record.same(outputs.logits[level].grad, f"grad_cls{level}")


def test_decoded_boxes(record):
    host, outputs = retina(), maps(record)
    _, sizes, _, _ = images(record)
    grid = host.priors(outputs.logits)[2]
    record.same(host.coding.decode(grid, 4 * rows_of(outputs.codes, 4)[2][0], sizes[0]), "decoded2")


@pytest.mark.parametrize(
    ("name", "selection", "scaled"),
    [("top", Selection(150, 0.05, 0.5, 20), True), ("all", Selection(150, 0.3, 0.5, 10**6), False)],
)
def test_detections(record, name, selection, scaled):
    host, outputs = retina(selection=selection), maps(record)
    _, sizes, _, scales = images(record)
    found = host.detections(outputs, sizes, scales if scaled else None)
    for image, (boxes, scores, labels, _) in enumerate(found):
        expected = in_order(record.out[f"det_{name}_boxes{image}"], record.out[f"det_{name}_labels{image}"])
        torch.testing.assert_close(
            in_order(torch.cat([boxes, scores[:, None]], 1), labels), expected, rtol=2e-5, atol=2e-4
        )
        assert torch.equal(scores, scores.sort(descending=True).values)
