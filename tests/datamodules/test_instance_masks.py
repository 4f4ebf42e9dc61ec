"""Masks of objects: polygons and run lengths against Pillow's and pycocotools', and how they come in batches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import masks_to_boxes

from penstock.datamodules.digit_scenes import DigitScenes
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import decoded, encoded, run_lengths, written
from tests.box_trees import coco, ready, with_masks

SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]


def test_polygons_are_filled():
    mask = decoded([run_lengths(SQUARE, 40, 50, "a")], (40, 50))
    assert mask.shape == (1, 40, 50)
    picture = Image.new("L", (50, 40))
    ImageDraw.Draw(picture).rectangle((10, 5, 29, 24), fill=1)
    assert np.array_equal(mask[0], np.array(picture))
    both = decoded([run_lengths([*SQUARE, [40, 30, 48, 30, 48, 38]], 40, 50, "a")], (40, 50))
    assert both.sum() > mask.sum()
    assert (both >= mask).all()


def test_run_lengths_are_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    masks = torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(0)) > 0.6
    found = encoded(masks)
    assert [one["counts"] for one in found] == [
        one["counts"] for one in tools.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    ]
    assert torch.equal(decoded(found, (17, 23)).bool(), masks)
    polygon = [[3.5, 2.25, 20.0, 4.0, 12.5, 15.75]]
    own, theirs = run_lengths(polygon, 17, 23, "a"), tools.merge(tools.frPyObjects(polygon, 17, 23))
    assert own["counts"] == theirs["counts"]


def test_run_lengths_in_all_forms():
    masks = torch.zeros(1, 4, 5, dtype=torch.bool)
    masks[0, 1:3, 2] = True
    (rle,) = encoded(masks)
    plain = {"size": [4, 5], "counts": [9, 2, 9]}  # column by column
    for form in (plain, rle, json.loads(json.dumps(written(rle)))):
        assert torch.equal(decoded([run_lengths(form, 4, 5, "a")], (4, 5)).bool(), masks)
    assert encoded(masks[:0]) == []
    assert decoded([], (4, 5)).shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("segmentation", "line"),
    [
        (None, "a: found 'segmentation' 'None', expected polygons"),
        ([], "expected polygons of at least three points"),
        ([[1, 2, 3, 4]], "expected polygons of at least three points"),
        ({"size": [5, 4], "counts": [20]}, r"a: found a mask of \[5, 4\] pixels, expected \[4, 5\]"),
    ],
)
def test_no_mask(segmentation, line):
    with pytest.raises(UserError, match=line):
        run_lengths(segmentation, 4, 5, "a")


def test_masks_follow_boxes(tmp_path, attach):
    data = ready(with_masks(coco(tmp_path)), masks=True, flip=True)
    attach(data)
    batch = next(iter(data.train_dataloader()))
    assert batch["masks"][0].dtype == torch.uint8
    for masks, boxes, size in zip(batch["masks"], batch["boxes"], batch["size"].tolist()):
        assert list(masks.shape) == [len(boxes), *size]
        found = masks_to_boxes(masks).float() + torch.tensor([0.0, 0, 1, 1])
        torch.testing.assert_close(found, boxes, atol=2.1, rtol=0)  # whole pixels of the original
    (target,) = data.targets([0])
    assert len(target["masks"]) == len(target["boxes"])


def test_masks_of_some_classes_keep_their_boxes(tmp_path):
    data = ready(with_masks(coco(tmp_path)), masks=True, classes=["toothbrush", "cat"])
    for target in data.targets(range(20)):
        if target["masks"]:
            found = masks_to_boxes(decoded(target["masks"], target["masks"][0]["size"])).float()
            torch.testing.assert_close(found + torch.tensor([0.0, 0, 1, 1]), target["boxes"], atol=1.01, rtol=0)


def test_sets_without_masks(tmp_path):
    with pytest.raises(UserError, match=r"annotation \d+: found 'segmentation' 'None'"):
        ready(coco(tmp_path), masks=True)


def test_digits_have_their_ink():
    data = DigitScenes(scenes=8, masks=True)
    data.setup("fit")
    for target in data.targets(range(8)):
        masks = decoded(target["masks"], (128, 128)).bool()
        assert (masks.sum(0) <= 1).all()
        for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].long().tolist()):
            assert mask.any()
            outside = mask.clone()
            outside[y1:y2, x1:x2] = False
            assert not outside.any()
