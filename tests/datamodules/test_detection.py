"""Detection sets: batches, their order, sizes, mirror images and padding, crowds, classes, memory, ranks, resuming."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from box_trees import SIZES, coco, edit, picture, ready, same, voc
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from penstock.datamodules.base import KindDataModule
from penstock.datamodules.readable import UNREADABLE
from penstock.kernels.philox import Draws
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError

BCCD = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD is not at ../shared/data")


@pytest.fixture(autouse=True)
def _own_data(monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)


def written(root, split="train"):
    """Boxes of every image of a JSON file, x1 y1 x2 y2, with names of classes: by image, as they stand in the file."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    found = {entry["id"]: [] for entry in content["images"]}
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        found[entry["image_id"]].append(([x, y, x + w, y + h], names[entry["category_id"]]))
    return content, found


def test_batches_are_what_the_file_says(tmp_path):
    data = ready(coco(tmp_path), keep_empty=True)
    content, found = written(tmp_path)
    assert (data.class_names, data.category_ids, data.num_classes) == (["cat", "dog", "toothbrush"], [2, 7, 90], 3)
    assert {split: len(n) for split, n in data.numbers.items()} == {"train": 20, "val": 5, "test": 4}
    assert [data.where(number) for number in (0, 20, 28)] == ["train/0000.png", "val/0000.png", "test/0003.png"]
    seen = []
    for batch in data.reference_dataloader("train"):
        assert set(batch) == {"image", "size", "original_size", "boxes", "label", "index"}
        assert batch["image"].dtype == torch.float32
        assert all(side % 32 == 0 for side in batch["image"].shape[2:])
        for k, number in enumerate(batch["index"].tolist()):
            entry = content["images"][number]
            original = torch.tensor([entry["height"], entry["width"]])
            assert batch["original_size"][k].tolist() == original.tolist()
            scale = min(64 / min(original), 128 / max(original))
            assert (batch["size"][k] - original * scale).abs().max() <= 0.5
            height, width = (batch["size"][k] / original).tolist()
            boxes = [[x1 * width, y1 * height, x2 * width, y2 * height] for (x1, y1, x2, y2), _ in found[entry["id"]]]
            torch.testing.assert_close(batch["boxes"][k], torch.tensor(boxes).reshape(-1, 4), atol=1e-4, rtol=0)
            assert batch["label"][k].dtype == torch.int64
            assert [data.class_names[c] for c in batch["label"][k].tolist()] == [name for _, name in found[entry["id"]]]
            seen.append(number)
    assert seen == list(range(20))


def test_images_are_resized_padded_with_grey_and_scaled(tmp_path):
    data = ready(coco(tmp_path), keep_empty=True)
    for batch in data.reference_dataloader("train"):
        assert batch["image"].shape[2:] == tuple(-(-side // 32) * 32 for side in batch["size"].amax(0).tolist())
        for image, (height, width), number in zip(batch["image"], batch["size"].tolist(), batch["index"].tolist()):
            resize = v2.Resize((height, width), antialias=True)
            expected = (
                resize(tv_tensors.Image(Image.open(tmp_path / data.where(number)).convert("RGB"))).float() / 127.5 - 1
            )
            torch.testing.assert_close(image[:, :height, :width], expected.as_subclass(torch.Tensor))
            assert not image[:, height:].any()
            assert not image[:, :, width:].any()


def test_a_batch_of_one_size_is_padded_to_a_multiple(tmp_path):
    data = ready(coco(tmp_path, sizes=((50, 70),)), min_size=50, max_size=70, pad_multiple=48)
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 96, 96)
    assert data.shape == (3, 96, 96)


def test_raw_batches_become_float_once(tmp_path):
    data = ready(coco(tmp_path))
    raw = next(iter(data.train_dataloader()))
    assert raw["image"].dtype == torch.uint8
    batch = data.on_after_batch_transfer(raw, 0)
    assert same(data.finished(batch), batch)
    assert raw["image"].dtype == torch.uint8
    outside = torch.ones_like(batch["image"], dtype=torch.bool)
    for k, (height, width) in enumerate(batch["size"].tolist()):
        outside[k, :, :height, :width] = False
    assert outside.any()
    assert not batch["image"][outside].any()
    torch.testing.assert_close(batch["image"][~outside], raw["image"][~outside].float() / 127.5 - 1, atol=1e-6, rtol=0)


def test_lists_move_with_the_batch(tmp_path):
    data = ready(coco(tmp_path), keep_empty=True)
    batch = next(iter(data.val_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["image"].is_meta
    for key in ("boxes", "label"):
        assert [(part.shape, part.dtype) for part in moved[key]] == [(part.shape, part.dtype) for part in batch[key]]
        assert all(part.is_meta for part in moved[key])
    for key in ("size", "original_size"):  # shapes are asked for without waiting for a device
        assert torch.equal(moved[key], batch[key])
    assert same(data.transfer_batch_to_device(batch, torch.device("cpu"), 0), batch)


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_training_images_of_several_sizes_are_resized_once_and_not_mirrored(tmp_path, memory_gb):
    coco(tmp_path, (("train", 20), ("val", 1)))
    data = ready(tmp_path, min_size=[40, 64, 52], memory_gb=memory_gb)
    for batch in data.train_dataloader():
        for k, (number, (height, width)) in enumerate(zip(batch["index"].tolist(), batch["size"].tolist())):
            image = tv_tensors.Image(Image.open(tmp_path / data.where(number)).convert("RGB"))
            boxes = tv_tensors.BoundingBoxes(
                data.targets([number])[0]["boxes"], format="XYXY", canvas_size=image.shape[1:]
            )
            image, boxes = v2.Resize((height, width), antialias=True)(image, boxes)
            assert torch.equal(batch["image"][k, :, :height, :width], image)
            assert torch.equal(batch["boxes"][k], boxes)


@pytest.mark.parametrize("workers", [0, 2])
def test_flips_are_keyed_and_those_of_torchvision(tmp_path, attach, workers):
    coco(tmp_path, (("train", 40), ("val", 1)))
    plain = ready(tmp_path, batch_size=20, keep_empty=True, group_aspects=False)
    data = attach(ready(tmp_path, flip=True, keep_empty=True, seed=9, batch_size=4, num_workers=workers), epoch=2)
    expected = {number: plain.view("train").fetch(np.array([number])) for number in range(40)}
    mirrored = []
    for batch in data.train_dataloader():
        flips = (Draws(9, 2, batch["index"]).uniform("flip") < 0.5).tolist()
        for k, number in enumerate(batch["index"].tolist()):
            height, width = batch["size"][k].tolist()
            image = tv_tensors.Image(expected[number]["image"][0, :, :height, :width])
            boxes = expected[number]["boxes"][0]
            boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
            image, boxes = v2.RandomHorizontalFlip(float(flips[k]))(image, boxes)
            assert torch.equal(batch["image"][k, :, :height, :width], image)
            assert torch.equal(batch["boxes"][k], boxes)
        mirrored += flips
    assert 8 < sum(mirrored) < 32


def test_boxes_follow_pixels(tmp_path):
    """A black rectangle on white is found where its box is, after resizing and mirroring."""
    coco(tmp_path, (("train", 24), ("val", 1)))
    content, write = edit(tmp_path)
    rng = np.random.default_rng(0)
    content["annotations"] = []
    for entry in content["images"]:
        x, y, w, h = *rng.integers(0, 12, 2), *rng.integers(8, 26, 2)
        pixels = np.full((entry["height"], entry["width"], 3), 255, dtype=np.uint8)
        pixels[y : y + h, x : x + w] = 0
        Image.fromarray(pixels).save(tmp_path / "train" / entry["file_name"])
        box = {"image_id": entry["id"], "category_id": 2, "bbox": [int(v) for v in (x, y, w, h)]}
        content["annotations"].append(box)
    write()
    data = ready(tmp_path, min_size=[40, 64, 75, 130], max_size=190, flip=True, group_aspects=False, seed=1)
    found = 0
    for batch in data.train_dataloader():
        for image, box, (height, width) in zip(data.finished(batch)["image"], batch["boxes"], batch["size"].tolist()):
            dark = image[0, :height, :width] < 0
            rows, columns = (dark.any(axis).nonzero().flatten() for axis in (1, 0))
            edges = torch.stack((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            assert (box[0] - edges).abs().max() <= 1
            found += 1
    assert found == 24


def test_sizes_are_drawn_for_each_training_image_and_evaluation_takes_the_last(tmp_path, attach):
    coco(tmp_path, (("train", 60), ("val", 5)))
    data = ready(tmp_path, min_size=[32, 48, 40], max_size=64)
    seen, again = [
        {
            number: tuple(size)
            for b in attach(data, epoch=e).train_dataloader()
            for number, size in zip(b["index"].tolist(), b["size"].tolist())
        }
        for e in (0, 1)
    ]
    sides = Counter()
    for number, size in seen.items():
        original = data.store.table.sizes[number]
        whole = [data.resizing.size(*original.tolist(), which) for which in range(3)]
        assert size in whole
        sides[whole.index(size)] += 1
        assert max(size) <= 64
        assert abs(size[0] / size[1] / (original[0] / original[1]) - 1) < 0.06
    assert len(sides) == 3
    assert min(sides.values()) > 4
    assert seen != {number: again[number] for number in seen if number in again}
    for batch in data.val_dataloader():
        wanted = [data.resizing.size(*size) for size in batch["original_size"].tolist()]
        assert batch["size"].tolist() == [list(size) for size in wanted]
    assert next(iter(data.val_dataloader()))["size"][2].tolist() == [40, 40], "a square of the last side"


def test_training_batches_are_wide_or_tall(tmp_path, attach):
    coco(tmp_path, (("train", 50), ("val", 5)))
    data = ready(tmp_path, keep_empty=True)
    for epoch in range(3):
        batches = list(attach(data, epoch=epoch).train_dataloader())
        seen = [number for batch in batches for number in batch["index"].tolist()]
        assert len(seen) == len(set(seen)) == 48
        tall = [(batch["original_size"][:, 0] > batch["original_size"][:, 1]).tolist() for batch in batches]
        assert all(len(set(kinds)) == 1 for kinds in tall)
        assert len({kinds[0] for kinds in tall}) == 2
    mixed = [
        set(row)
        for row in (
            (b["original_size"][:, 0] > b["original_size"][:, 1]).tolist()
            for b in ready(tmp_path, group_aspects=False).train_dataloader()
        )
    ]
    assert {True, False} in mixed


def test_an_aspect_that_fills_no_batch_is_mixed_in(tmp_path):
    coco(tmp_path, (("train", 18), ("val", 1)), sizes=((48, 64),) * 8 + ((64, 48),))
    data = ready(tmp_path, keep_empty=True, batch_size=3)
    assert len(data.train_dataloader()) == 6
    seen = [number for batch in data.train_dataloader() for number in batch["index"].tolist()]
    assert sorted(seen) == list(range(18))


def test_crowds_are_not_trained_on_and_are_targets(tmp_path):
    coco(tmp_path)
    content, write = edit(tmp_path, "val")
    crowd = content["annotations"][0]
    crowd["iscrowd"] = 1
    write()
    data = ready(tmp_path)
    number = int(data.numbers["val"][[entry["id"] for entry in content["images"]].index(crowd["image_id"])])
    own = [entry for entry in content["annotations"] if entry["image_id"] == crowd["image_id"]]
    batch = data.view("val").fetch(np.flatnonzero(data.numbers["val"] == number))
    assert len(batch["boxes"][0]) == len(batch["label"][0]) == len(own) - 1
    (target,) = data.targets(batch["index"])
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in own)])
    torch.testing.assert_close(target["boxes"], boxes)
    assert target["labels"].tolist() == [data.category_ids.index(entry["category_id"]) for entry in own]
    assert target["iscrowd"].tolist() == [entry["iscrowd"] for entry in own]
    torch.testing.assert_close(target["area"], torch.tensor([entry["area"] for entry in own]))
    assert target["image_id"] == crowd["image_id"]
    assert [t["image_id"].item() for t in data.targets(data.numbers["val"])] == [e["id"] for e in content["images"]]


def test_images_of_crowds_alone_are_empty(tmp_path):
    coco(tmp_path)
    content, write = edit(tmp_path)
    first = content["images"][0]["id"]
    content["annotations"] = [{**e, "iscrowd": int(e["image_id"] == first)} for e in content["annotations"]]
    write()
    assert 0 not in ready(tmp_path).numbers["train"]
    assert 0 in ready(tmp_path, keep_empty=True).numbers["train"]


def test_empty_images(tmp_path):
    coco(tmp_path)
    assert ready(tmp_path).numbers["train"].tolist() == [k for k in range(20) if k % 5 != 4]
    data = ready(tmp_path, keep_empty=True)
    assert data.numbers["train"].tolist() == list(range(20))
    batch = data.view("train").fetch(np.array([3, 4]))
    assert (batch["boxes"][1].shape, batch["label"][1].shape) == ((0, 4), (0,))
    assert (batch["boxes"][1].dtype, batch["label"][1].dtype) == (torch.float32, torch.int64)
    assert ready(tmp_path).numbers["val"].tolist() == list(range(20, 25)), "evaluation has them"


def test_some_classes_in_another_order(tmp_path):
    whole, data = (
        ready(coco(tmp_path), keep_empty=True),
        ready(tmp_path, keep_empty=True, classes=["toothbrush", "cat"]),
    )
    assert (data.class_names, data.category_ids, data.num_classes) == (["toothbrush", "cat"], [90, 2], 2)
    new = {0: 1, 2: 0}
    for a, b in zip(whole.targets(np.arange(20)), data.targets(np.arange(20))):
        kept = [k for k, label in enumerate(a["labels"].tolist()) if label in new]
        assert torch.equal(a["boxes"][kept], b["boxes"])
        assert [new[label] for label in a["labels"][kept].tolist()] == b["labels"].tolist()
        assert a["image_id"] == b["image_id"]
    filled = [k for k, target in enumerate(data.targets(np.arange(20))) if len(target["boxes"])]
    assert ready(tmp_path, classes=["toothbrush", "cat"]).numbers["train"].tolist() == filled


def test_joined_classes(tmp_path):
    whole = ready(coco(tmp_path), keep_empty=True)
    data = ready(tmp_path, keep_empty=True, classes={"thing": ["toothbrush"], "pet": ["dog", "cat"]})
    assert (data.class_names, data.category_ids) == (["thing", "pet"], [90, 7])
    for a, b in zip(whole.targets(np.arange(20)), data.targets(np.arange(20))):
        assert torch.equal(a["boxes"], b["boxes"])
        assert [{0: 1, 1: 1, 2: 0}[label] for label in a["labels"].tolist()] == b["labels"].tolist()


def test_missing_splits(tmp_path):
    coco(tmp_path / "a", (("train", 10), ("val", 3)))
    data = ready(tmp_path / "a")
    assert data.view("test").numbers.tolist() == data.view("val").numbers.tolist() == [10, 11, 12]
    coco(tmp_path / "b", (("train", 10), ("test", 3)))
    data = ready(tmp_path / "b")
    assert data.val_dataloader() == []
    data = ready(tmp_path / "b", val_fraction=0.3, keep_empty=True)
    assert {split: len(n) for split, n in data.numbers.items()} == {"train": 7, "val": 3, "test": 3}
    assert sorted([*data.numbers["train"], *data.numbers["val"]]) == list(range(10))
    assert data.numbers["test"].tolist() == [10, 11, 12]


def test_trainval(tmp_path):
    coco(tmp_path, (("train", 10), ("val", 4), ("test", 3)))
    data = ready(tmp_path, trainval=True, keep_empty=True)
    assert {split: n.tolist() for split, n in data.numbers.items()} == {
        "train": list(range(14)),
        "val": [],
        "test": [14, 15, 16],
    }
    data = ready(tmp_path, trainval=True, val_fraction=0.5, keep_empty=True)
    assert (len(data.numbers["train"]), len(data.numbers["val"])) == (7, 7)
    assert sorted([*data.numbers["train"], *data.numbers["val"]]) == list(range(14))


def test_turned_photographs(tmp_path):
    """Annotated as they lie in the file, or as viewers show them."""
    coco(tmp_path, (("train", 6), ("val", 1)), sizes=((40, 60),))
    content, write = edit(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    for entry in content["images"][:2]:
        picture(0, 40, 60).save(tmp_path / "train" / entry["file_name"], exif=exif)
    content["images"][1] |= {"height": 60, "width": 40}
    content["annotations"] = [{**entry, "bbox": [1, 1, 10, 10]} for entry in content["annotations"]]
    write()
    store = ready(tmp_path).store
    lying, shown = store.decode(0), store.decode(1)
    assert (lying.shape, shown.shape) == ((3, 40, 60), (3, 60, 40))
    assert torch.equal(shown, lying.rot90(-1, (1, 2)))


def test_modes_of_images(tmp_path):
    coco(tmp_path, (("train", 6), ("val", 1)), sizes=((40, 60),))
    rgb = picture(3, 40, 60)
    for k, mode in enumerate(("L", "P", "RGBA", "1")):
        rgb.convert(mode).save(tmp_path / "train" / f"{k:04d}.png")
    store = ready(tmp_path).store
    for k, mode in enumerate(("L", "P", "RGBA", "1")):
        expected = np.asarray(rgb.convert(mode).convert("RGB"))
        assert np.array_equal(store.decode(k).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (2000, 3)])
def test_images_of_a_pixel_and_thin_ones(tmp_path, size):
    coco(tmp_path, (("train", 4), ("val", 1)), sizes=((40, 60),))
    content, write = edit(tmp_path)
    content["images"][0] |= {"height": size[0], "width": size[1]}
    content["annotations"] = [{"image_id": e["id"], "category_id": 2, "bbox": [0, 0, 1, 1]} for e in content["images"]]
    write()
    picture(0, *size).save(tmp_path / "train" / "0000.png")
    batch = ready(tmp_path).view("train").fetch(np.arange(2))
    height, width = batch["size"][0].tolist()
    assert (min(height, width) >= 1, max(height, width) <= 128) == (True, True)
    expected = torch.tensor([[0, 0, width / size[1], height / size[0]]])
    torch.testing.assert_close(batch["boxes"][0], expected)


def test_fingerprint_changes_with_content_and_settings(tmp_path):
    coco(tmp_path)
    base = ready(tmp_path).fingerprint
    assert ready(tmp_path, seed=9, num_workers=1, memory_gb=0).fingerprint == base
    settings = [{"min_size": 48}, {"max_size": 100}, {"classes": ["cat"]}, {"keep_empty": True}, {"flip": True}]
    settings += [{"classes": {"pet": ["cat", other]}, "keep_empty": True} for other in ("dog", "toothbrush")]
    prints = {ready(tmp_path, **s).fingerprint for s in settings}
    content, write = edit(tmp_path)
    content["annotations"][0]["bbox"][2] += 0.5
    write()
    prints.add(ready(tmp_path).fingerprint)
    picture(77, *SIZES[0]).save(tmp_path / "train" / "0000.png")
    prints.add(ready(tmp_path).fingerprint)
    assert len(prints | {base}) == len(settings) + 3


@pytest.mark.parametrize("workers", [0, 2])
def test_prediction_leaves_out_what_cannot_be_read(tmp_path, workers):
    coco(tmp_path)
    (tmp_path / "test" / "0001.png").write_bytes(b"not an image")
    data = ready(tmp_path, memory_gb=0, num_workers=workers)
    (batch,) = data.predict_dataloader()
    assert batch["index"].tolist() == [25, 27, 28]
    assert len(batch["boxes"]) == len(batch["image"]) == 3
    assert UNREADABLE not in batch
    with pytest.raises(UserError, match=r"/test/0001\.png: cannot read the image .*; all others were predicted$"):
        data.teardown("predict")


@pytest.mark.parametrize(
    ("words", "kind", "sizes", "classes"),
    [
        (["data=bccd"], "bccd", ((240,), 320), None),
        (["data=bccd", "image_size=[480,640]"], "bccd", ((480,), 640), None),
        (["data=coco", "data.min_size=[640,800]"], "coco", ((640, 800), 1333), None),
        (["data=voc", "data.classes=[cat,dog]", "num_classes=2"], "voc", ((600,), 1000), ["cat", "dog"]),
        (["data=coco", "data.classes={pet: [cat, dog]}"], "coco", ((800,), 1333), {"pet": ["cat", "dog"]}),
    ],
)
def test_the_words_of_the_command_line(words, kind, sizes, classes):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(KindDataModule, "data")
    tree, _ = compose(words)
    data = parser.instantiate_classes(parser.parse_object({"data": tree["data"]})).data
    assert (data.name, data.classes, (data.resizing.sides, data.resizing.longest)) == (kind, classes, sizes)


def test_voc_batches(tmp_path):
    data = ready(voc(tmp_path), keep_empty=True)
    assert (data.class_names, data.category_ids) == (["cat", "dog"], [1, 2])
    for batch in data.reference_dataloader("train"):
        for size, boxes, labels, number in zip(batch["size"], batch["boxes"], batch["label"], batch["index"].tolist()):
            assert labels.tolist() == [0]
            torch.testing.assert_close(boxes[0], torch.tensor([0, 0, size[1], size[0]], dtype=torch.float32))
            (target,) = data.targets(np.array([number]))
            assert target["iscrowd"].tolist() == [0, 1][: 1 + number % 2]
            if number % 2:
                assert target["boxes"][1].tolist() == [4, 5, 14.5, 25]
                assert target["labels"].tolist() == [0, 1]
                assert target["area"][1] == 10.5 * 20
            assert target["image_id"] == number + 1


@needs_bccd
def test_bccd():
    data = ready(BCCD, min_size=240, max_size=320, flip=True, memory_gb=0)
    assert {split: len(n) for split, n in data.numbers.items()} == {"train": 205, "val": 87, "test": 72}
    assert (data.class_names, data.category_ids) == (["RBC", "WBC", "Platelets"], [1, 2, 3])
    assert len(data.store.table.boxes) == 4886
    for split, numbers in data.numbers.items():
        content, found = written(BCCD, split)
        targets = data.targets(numbers)
        assert [target["image_id"].item() for target in targets] == [entry["id"] for entry in content["images"]]
        for target, boxes in zip(targets, found.values()):
            assert target["boxes"].tolist() == [box for box, _ in boxes]
            assert [data.class_names[k] for k in target["labels"].tolist()] == [name for _, name in boxes]
    batch = data.finished(next(iter(data.train_dataloader())))
    assert batch["image"].shape == (4, 3, 256, 320)
    assert batch["size"].tolist() == [[240, 320]] * 4
