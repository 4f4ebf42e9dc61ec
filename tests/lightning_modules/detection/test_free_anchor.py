"""FreeAnchor against the official code's numbers and in closed form."""

import pytest
import torch

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.coding import Deltas
from penstock.lightning_modules.detection.free_anchor import FreeAnchor, mean_max
from penstock.lightning_modules.detection.host import Objects, Outputs
from tests.detection_files import images, maps
from tests.golden_files import Record

STDS = (0.1, 0.1, 0.2, 0.2)


def test_golden():
    record = Record("sepc", "11", dtype=torch.float32)
    outputs = maps(record)
    objects, _, padded, _ = images(record)
    found = FreeAnchor(4, Anchors(legacy=True), Deltas(STDS, 1.0)).losses(outputs, objects, padded)
    record.same(found["bag"], "positive_bag_loss")
    record.same(found["background"], "negative_bag_loss")
    sum(found.values()).backward()
    for level in range(5):
        record.same(outputs.codes[level].grad, f"grad_reg{level}")
        if f"grad_cls{level}" in record.out:
            record.same(outputs.logits[level].grad, f"grad_cls{level}")
    assert not record.left


def test_mean_max():
    assert float(mean_max(torch.tensor([0.9, 0.1], dtype=torch.float64))) == pytest.approx(0.82, abs=1e-12)
    for p in (0.0, 0.3, 1.0):
        assert float(mean_max(torch.full((7,), p, dtype=torch.float64))) == pytest.approx(p, abs=1e-12)


def test_images_without_objects_and_predictions_that_fit_nothing():
    host = FreeAnchor(3, Anchors((8, 16), legacy=False), Deltas(STDS))
    logits = [torch.randn(2, 27, 4, 4, requires_grad=True), torch.randn(2, 27, 2, 2, requires_grad=True)]
    codes = [torch.full((2, 36, 4, 4), -9.0), torch.full((2, 36, 2, 2), -9.0)]
    objects = [
        Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64)),
        Objects(torch.tensor([[2.0, 2, 30, 30]]), torch.tensor([1])),
    ]
    found = host.losses(Outputs(logits, codes), objects, [(32, 32)] * 2)
    assert all(torch.isfinite(x) for x in found.values())
    sum(found.values()).backward()
    assert all(torch.isfinite(y.grad).all() for y in logits)
    _, found, anchors = host.flat(Outputs(logits, codes))
    assert not host._of_objects(found[1], anchors, objects[1]).any()
