"""Layouts of detection sets, and what is done to boxes before anyone sees them."""

import json
import shutil
import warnings

import numpy as np
import pytest
from box_trees import SIZES, coco, edit, picture, voc, voc_object, voc_xml, write
from PIL import Image

from penstock.datamodules.annotations import annotations, joined
from penstock.datamodules.detection_sources import open_boxed

NAMES = ["cat", "dog", "toothbrush"]


def test_coco(tmp_path):
    found = open_boxed(coco(tmp_path))
    assert (found.class_names, found.category_ids) == (NAMES, [2, 7, 90])
    assert {split: len(part.files) for split, part in found.splits.items()} == {"train": 20, "val": 5, "test": 4}
    for split, part in found.splits.items():
        content = json.loads((tmp_path / "annotations" / f"instances_{split}.json").read_text())
        assert [file.relative_to(tmp_path).as_posix() for file in part.files] == [
            f"{split}/{entry['file_name']}" for entry in content["images"]
        ]
        assert part.table.image_ids.tolist() == [entry["id"] for entry in content["images"]]
        assert part.table.sizes.tolist() == [[entry["height"], entry["width"]] for entry in content["images"]]
        for number, image in enumerate(content["images"]):
            own = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
            rows = part.table.rows(number)
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in own)]
            assert part.table.boxes[rows].tolist() == boxes
            assert [found.category_ids[k] for k in part.table.classes[rows]] == [entry["category_id"] for entry in own]
            assert part.table.areas[rows].tolist() == [entry["area"] for entry in own]


def test_years_and_folders_of_images(tmp_path):
    counts = (("train2014", 3), ("train2017", 6), ("val2017", 2))
    coco(tmp_path, counts, images="images")
    write({"images": []}, tmp_path / "annotations" / "image_info_test2017.json")
    write({"annotations": []}, tmp_path / "annotations" / "captions_train2017.json")
    found = open_boxed(tmp_path)
    assert {split: len(part.files) for split, part in found.splits.items()} == {"train": 6, "val": 2}
    assert found.splits["train"].files[0] == tmp_path / "images" / "train2017" / "0000.png"
    shutil.move(tmp_path / "images" / "train2014", tmp_path / "train2014")
    shutil.rmtree(tmp_path / "images" / "train2017")
    assert len(open_boxed(tmp_path).splits["train"].files) == 3, "the latest year whose images are there"


def test_images_in_folders_of_a_split(tmp_path):
    coco(tmp_path, (("train", 3), ("valid", 1)))
    content, rewrite = edit(tmp_path)
    (tmp_path / "train" / "a" / "b").mkdir(parents=True)
    (tmp_path / "train" / "0001.png").rename(tmp_path / "train" / "a" / "b" / "c.png")
    content["images"][1]["file_name"] = "a/b/c.png"
    rewrite()
    found = open_boxed(tmp_path)
    assert found.splits["train"].files[1] == tmp_path / "train" / "a" / "b" / "c.png"
    assert len(found.splits["val"].files) == 1


def test_areas_and_crowds_may_be_left_out(tmp_path):
    coco(tmp_path)
    content, rewrite = edit(tmp_path)
    for entry in content["annotations"]:
        del entry["area"], entry["iscrowd"], entry["id"]
    rewrite()
    table = open_boxed(tmp_path).splits["train"].table
    np.testing.assert_allclose(table.areas, np.prod(table.boxes[:, 2:] - table.boxes[:, :2], axis=1))
    assert not table.crowd.any()


def test_a_split_without_boxes(tmp_path):
    coco(tmp_path)
    content, rewrite = edit(tmp_path, "val")
    content["annotations"] = []
    rewrite()
    table = open_boxed(tmp_path).splits["val"].table
    assert (len(table), len(table.boxes), table.boxes.shape, table.filled().tolist()) == (5, 0, (0, 4), [False] * 5)


def test_voc(tmp_path):
    found = open_boxed(voc(tmp_path))
    assert (found.class_names, found.category_ids) == (["cat", "dog"], [1, 2])
    train = found.splits["train"]
    assert [file.name for file in train.files] == [f"2007_{k:06d}.jpg" for k in range(6)]
    for k in range(6):
        rows, (height, width) = train.table.rows(k), SIZES[k % 5]
        assert train.table.sizes[k].tolist() == [height, width]
        assert train.table.boxes[rows].tolist() == [[0, 0, width, height], [4, 5, 14.5, 25]][: 1 + k % 2]
        assert train.table.crowd[rows].tolist() == [False, True][: 1 + k % 2]
    assert {split: len(part.files) for split, part in found.splits.items()} == {"train": 6, "val": 3, "test": 2}


def test_voc_as_it_is_published(tmp_path):
    """Test images without annotations; sizes of zero; png; lists with a second column; boxes that begin at 0."""
    voc(tmp_path)
    for xml in (tmp_path / "Annotations").glob("2007_0002*.xml"):
        xml.unlink()
    names = (tmp_path / "ImageSets" / "Main" / "train.txt").read_text().split()
    write("\n".join(f"{name}  1" for name in names) + "\n\n", tmp_path / "ImageSets" / "Main" / "train.txt")
    write(voc_xml(0, 0, voc_object("cat", (0, 0, 64, 48))), tmp_path / "Annotations" / f"{names[0]}.xml")
    (tmp_path / "JPEGImages" / f"{names[1]}.jpg").unlink()
    picture(0, *SIZES[1]).save(tmp_path / "JPEGImages" / f"{names[1]}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_boxed(tmp_path)
    assert set(found.splits) == {"train", "val"}
    table = found.splits["train"].table
    assert (table.sizes[0].tolist(), table.boxes[0].tolist()) == ([48, 64], [0, 0, 64, 48])
    assert found.splits["train"].files[1].suffix == ".png"
    with Image.open(found.splits["train"].files[1]) as opened:
        assert opened.size == SIZES[1][::-1]


def checked(*boxes, size=(40, 60)):
    n = len(boxes)
    return annotations(
        [size], [0] * n, boxes, range(n), [0] * n, [1] * n, image_ids=[5], where=lambda k: f"box {k}", place="x.json"
    )


def test_boxes_are_cut_at_the_edges():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = checked((-1, -0.5, 20, 20), (0, 0, 60, 40), (30, 30, 60.7, 41))
    assert table.boxes.tolist() == [[0, 0, 20, 20], [0, 0, 60, 40], [30, 30, 60, 40]]
    line = (
        r"^x\.json: 2 of 3 boxes cut at the edge of the image; the first is box 1 of 22x20 at \[-2\.0, 0\.0\] \(60x40"
    )
    with pytest.warns(UserWarning, match=line):
        table = checked((1, 1, 9, 9), (-2, 0, 20, 20), (30, 30, 70, 40))
    assert table.boxes.tolist() == [[1, 1, 9, 9], [0, 0, 20, 20], [30, 30, 60, 40]]


def test_boxes_of_zero_area_are_left_out():
    line = r"^x\.json: 2 of 3 boxes of zero area left out; the first is box 0 of 0x4 at \[60\.0, 1\.0\]"
    with pytest.warns(UserWarning, match=line):
        table = checked((60, 1, 60, 5), (1, 1, 9, 9), (5, 5, 9, 5))
    assert (table.boxes.tolist(), table.classes.tolist()) == ([[1, 1, 9, 9]], [1])


def test_boxes_are_put_in_the_order_of_images():
    rng = np.random.default_rng(0)
    image_of = rng.integers(0, 7, 40)
    xy = rng.uniform(0, 20, (40, 2))
    boxes = np.concatenate([xy, xy + rng.uniform(1, 10, (40, 2))], 1)
    table = annotations(
        [(40, 60)] * 7, image_of, boxes, range(40), image_of % 2, range(40), image_ids=range(7), where=str, place=""
    )
    for number in range(7):
        own = np.flatnonzero(image_of == number)
        assert table.classes[table.rows(number)].tolist() == own.tolist()
        assert table.areas[table.rows(number)].tolist() == own.tolist()
        assert np.array_equal(table.boxes[table.rows(number)], boxes[own])
    assert table.filled().tolist() == [number % 2 == 0 for number in range(7)]
    whole = joined([table, table.only(table.classes < 20), table])
    assert len(whole) == 21
    for number in range(21):
        own = np.flatnonzero((image_of == number % 7) & ((np.arange(40) < 20) | (number // 7 != 1)))
        assert whole.classes[whole.rows(number)].tolist() == own.tolist()
