"""Metrics of pixels against scikit-learn's and torchmetrics', classes that are nowhere, ranks, colours."""

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import running
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from penstock.lightning_modules.callbacks.segmentation_metrics import confusion, scores_of
from penstock.lightning_modules.callbacks.segmentation_pictures import coloured, palette
from tests.mask_trees import mask_tree

NAMES = ["road", "car", "tree", "sky", "sea"]


def masks(classes=5):
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randint(0, classes, (3, 20, 30), generator=generator, dtype=torch.uint8) for _ in range(2))
    found = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, noise)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    return found, truth


def test_table_against_scikit_learn():
    found, truth = masks()
    counts = confusion(found, truth, 5)
    kept = truth != 255
    assert np.array_equal(counts.numpy(), confusion_matrix(truth[kept].numpy(), found[kept].numpy(), labels=range(5)))
    parts = sum(confusion(a, b, 5) for a, b in zip(found, truth))
    assert torch.equal(parts, counts)


def test_metrics_against_torchmetrics():
    found, truth = masks()
    values = scores_of(confusion(found, truth, 5), NAMES)
    options = {"num_classes": 5, "ignore_index": 255}
    iou = MulticlassJaccardIndex(average="none", **options)(found.long(), truth.long())
    assert [values[f"iou_of/{name}"] for name in NAMES] == pytest.approx(iou.tolist(), abs=1e-6)
    assert values["miou"] == pytest.approx(float(iou.mean()), abs=1e-6)
    for name, average in (("mean_accuracy", "macro"), ("pixel_accuracy", "micro")):
        expected = float(MulticlassAccuracy(average=average, **options)(found.long(), truth.long()))
        assert values[name] == pytest.approx(expected, abs=1e-6)
    assert 0.3 < values["miou"] < values["pixel_accuracy"] < 0.9


def test_classes_that_are_nowhere_do_not_count():
    """Of one that is only found the intersection over union is 0, and it has no accuracy."""
    truth = torch.tensor([0, 0, 0, 1, 1, 255])
    found = torch.tensor([0, 0, 2, 1, 0, 3])
    values = scores_of(confusion(found, truth, 5), NAMES)
    assert values == pytest.approx(
        {
            "miou": (2 / 4 + 1 / 2 + 0) / 3,
            "mean_accuracy": (2 / 3 + 1 / 2) / 2,
            "pixel_accuracy": 3 / 5,
            "iou_of/road": 2 / 4,
            "iou_of/car": 1 / 2,
            "iou_of/tree": 0,
        }
    )


def test_colours_are_pascal_vocs():
    assert palette()[[0, 1, 2, 3, 8, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [64, 0, 0],
        [0, 64, 128],
        [255, 255, 255],
    ]
    assert len({tuple(row) for row in palette().tolist()}) == 256
    picture = coloured(torch.tensor([[0, 1], [255, 2]], dtype=torch.uint8))
    assert picture[:, 1, 0].tolist() == [255] * 3
    assert picture[:, 0, 1].tolist() == [128, 0, 0]


def test_two_ranks_are_one(fakes, monkeypatch, tmp_path):
    """An odd number of images of several sizes, the validation images being the test images."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(importlib.sys.modules, "fakes", fakes)
    made = importlib.import_module("segmentation_model")
    tree = mask_tree(tmp_path / "tree", (("training", 8), ("validation", 7)))
    with running(Path(made.__file__), tree, tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = made.run(1, tree, tmp_path / "one")
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert (one["world"], two[0]["world"]) == (1, 2)
    assert sorted(two[0]["seen"] + two[1]["seen"]) == one["seen"] == list(range(8, 15))
    assert two[0]["found"] == two[1]["found"] == one["found"]
    assert 0.4 < one["found"]["val/miou"] == one["found"]["best_on_test/miou"] < 0.9
    pictures = [next((tmp_path / name / "samples").glob("*.png")).read_bytes() for name in ("one", "two")]
    assert pictures[0] == pictures[1]
