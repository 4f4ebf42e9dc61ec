"""What detectors cost: lines of all rivals, and units of the necks as section 2 of arXiv 2005.03101 counts them."""

import pytest
import torch

from penstock.benchmarks.sepc_cost import NECKS, PEER, forms, predictions, sizes_of, steps
from penstock.lightning_modules.nets.detector import Detector


def test_a_line_for_each_detector_with_the_units_of_its_neck():
    rows = predictions((256, 256), torch.device("cpu"), 1, "resnet18", 16, 3)
    assert [row["detector"] for row in rows] == [*NECKS, PEER]
    units = {row["detector"]: row["neck, units"] for row in rows}
    area = [h * w for h, w in sizes_of((256, 256))]
    pconv = (sum(area) + 2 * sum(area[1:])) / sum(area)
    assert units["baseline"] == pytest.approx(8)
    assert units["Pconv"] == units["Pconv+iBN"] == pytest.approx(4 * pconv + 2)
    offsets = 18 / 16 * sum(area[1:]) / sum(area)  # of a convolution on all levels but the finest
    assert units["SEPC-lite"] == pytest.approx(units["Pconv"] + 2 * offsets)
    coarse = 18 / 16 * sum(area[2:]) / sum(area)
    assert units["SEPC"] == pytest.approx(units["SEPC-lite"] + 4 * (2 * offsets + coarse))
    assert rows[0]["over the baseline, %"] == 0
    assert all(row["ms"] > 0 and row["activations, MiB"] > 1 for row in rows)


def test_steps_train_every_detector():
    rows = steps((128, 160), 1, torch.device("cpu"), 1, "resnet18", 16)
    assert [row["detector"] for row in rows] == [*NECKS, PEER]
    assert rows[0]["over the baseline, %"] == 0
    assert rows[-1]["faster than torchvision's"] == 1


def test_forms_give_the_same_maps(monkeypatch):
    monkeypatch.setattr(Detector, "compile", lambda self, **_: None)  # takes minutes
    rows = forms((128, 160), torch.device("cpu"), 1, "resnet18", 16, 3)
    assert [row["form"] for row in rows] == ["as it is", "folded", "folded, channels_last", "folded, compiled"]
    assert max(row["largest difference"] for row in rows) < 1e-4
    assert rows[1]["largest difference"] > 0
