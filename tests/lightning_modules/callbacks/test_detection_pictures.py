"""Pictures of boxes: where they and their labels are, and what W&B is sent."""

import importlib
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from penstock.lightning_modules.callbacks.detection_pictures import SIDE, DetectionGallery, colours, drawn
from penstock.lightning_modules.errors import UserError
from tests.box_trees import coco, ready


@pytest.fixture
def made(fakes, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(importlib.sys.modules, "fakes", fakes)
    return importlib.import_module("detection_model")


def test_labels_stand_on_a_patch_of_their_colour():
    """Above a box, or in it at the upper border, and never beyond the right one; the rest of the image is as it was."""
    image = torch.full((3, 200, 250), 90, dtype=torch.uint8)
    boxes, labels = torch.tensor([[40.0, 80, 120, 150], [200, 0, 249, 60]]), torch.tensor([1, 3])
    found = drawn(image, boxes, labels, ["a", "b", "c", "longer"], torch.tensor([0.5, 0.9])).permute(1, 2, 0)
    one, other = (torch.tensor(colour, dtype=torch.uint8) for colour in colours(labels))
    patch, corner = found[67:78, 41:60], found[2:13, 190:249]
    for part, colour in ((patch, one), (corner, other)):
        away = (part.int() - colour.int()).abs().sum(2)
        assert (away == 0).float().mean() > 0.3
        assert 0.05 < (away > 150).float().mean() < 0.5  # letters
    assert (found[80, 40:121] == one).all()
    assert (found[150, 40:121] == one).all()
    assert (found[100:140, 50:110] == 90).all()
    assert (found[155:] == 90).all()
    assert torch.equal(drawn(image, boxes[:0], labels[:0], []), image)


class Seen(WandbLogger):
    """Keeps what it is sent."""

    save_dir = name = version = None

    def __init__(self):
        self.sent = {}

    def log_image(self, key, images, step=None, **options):
        self.sent[key] = images, step, options

    def log_metrics(self, metrics, step=None):
        pass

    def finalize(self, status):
        pass


def test_gallery(made, tmp_path):
    wandb = pytest.importorskip("wandb")
    module, logger = made.Mover((0.5,)), Seen()
    data = ready(coco(tmp_path / "tree", (("train", 20), ("val", 5), ("test", 4))), eval_batch_size=3)
    settings = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False}
    trainer = pl.Trainer(**settings, callbacks=[DetectionGallery(3, score=0.5)], logger=logger)
    trainer.test(module, datamodule=data, verbose=False)
    sheet = np.asarray(Image.open(tmp_path / "samples" / "test.png"))
    assert sheet.shape[1] == 4 * (SIDE + 2) + 2
    (picture,), _, _ = logger.sent["detections"]
    assert np.array_equal(np.asarray(picture), sheet)
    images, _, options = logger.sent["boxes"]
    numbers = data.view("test").numbers[[0, 2, 3]]
    assert len(images) == len(options["boxes"]) == 3
    for number, target, pixels, boxes in zip(numbers, data.targets(numbers), images, options["boxes"]):
        assert pixels.shape[:2] == tuple(data.store.table.sizes[number])
        found = module.found(int(number), target)
        for kind, expected, labels in (
            ("ground_truth", target["boxes"], target["labels"]),
            ("predictions", found["boxes"], found["labels"]),
        ):
            rows = boxes[kind]["box_data"]
            assert [row["class_id"] for row in rows] == labels.tolist()
            assert [list(row["position"].values()) for row in rows] == expected.tolist()
            assert boxes[kind]["class_labels"] == {0: "cat", 1: "dog", 2: "toothbrush"}
        scores = [row["scores"]["score"] for row in boxes["predictions"]["box_data"]]
        assert scores == found["scores"].tolist()
        assert set(wandb.Image(pixels, boxes=boxes)._boxes) == {"ground_truth", "predictions"}


def test_marked_boxes_and_those_above_the_score_are_in_the_picture(made, tmp_path):
    """Left the objects, right what is found: with scores that nothing reaches the right one is the image alone."""
    data = ready(coco(tmp_path / "tree", (("train", 20), ("val", 5), ("test", 1)), sizes=((160, 320),)))
    settings = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False, "logger": False}
    trainer = pl.Trainer(**settings, callbacks=[DetectionGallery(1, score=1.0)])
    trainer.test(made.Mover(), datamodule=data, verbose=False)
    sheet = np.asarray(Image.open(tmp_path / "samples" / "test.png"))
    left, right = sheet[2:162, 2:322], sheet[2:162, 324:644]
    (target,) = data.targets(data.view("test").numbers)
    changed = (left != right).any(2)
    for (x1, y1, x2, y2), colour in zip(target["boxes"].int().tolist(), colours(target["labels"])):
        frame = [left[y, x1 + 1 : x2] for y in (y1, y2)] + [left[y1 + 1 : y2, x] for x in (x1, x2)]
        assert (np.concatenate(frame) == colour).all(1).mean() > 0.4  # labels of others may lie over it
    assert 0.01 < changed.mean() < 0.9


@pytest.mark.parametrize(("options", "line"), [({"images": 0}, "images: 0 given"), ({"score": 2}, "score: 2 given")])
def test_out_of_range(options, line):
    with pytest.raises(UserError, match=line):
        DetectionGallery(**options)
