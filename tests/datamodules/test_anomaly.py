"""Anomaly-detection sets: splits, sizes and masks against independent computations, shots, ranks, augmentation."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from anomaly_trees import SIZE, btad, marked, mvtec, picture, save, visa
from jsonargparse import ArgumentParser
from PIL import ExifTags, Image

from penstock.datamodules.anomaly import Anomaly
from penstock.datamodules.base import KindDataModule, halves
from penstock.kernels.philox import Draws
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError

TILES = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "magnetic_tile"
needs_tiles = pytest.mark.skipif(not TILES.is_dir(), reason="the magnetic tiles are not at ../shared/data")


@pytest.fixture(autouse=True)
def _own_data(monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)


def ready(root, category="bolt", **options):
    data = Anomaly("mine", str(root), category, **({"image_size": 8, "batch_size": 2} | options))
    data.prepare_data()
    data.setup()
    return data


def whole(data, split):
    batches = list(data.reference_dataloader(split))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def nearest(mask, height, width):
    """A mask at another size, pixel by pixel: the one under the centre of each new one."""
    pixels = np.asarray(mask)
    rows, columns = (
        [int((Fraction(2 * i + 1, 2) * old) // new) for i in range(new)]
        for old, new in zip(pixels.shape, (height, width))
    )
    return np.array([[int(pixels[row, column] > 0) for column in columns] for row in rows], dtype=np.uint8)


def test_mvtec_layout(tmp_path):
    data = ready(mvtec(tmp_path))
    assert (data.shape, data.num_classes, data.class_names) == ((3, 8, 8), 0, ["normal", "anomalous"])
    assert (data.defects, data.val_is_test, data.augments, data.levels) == (["crack", "dent"], True, False, 256)
    assert data.defect_of.tolist() == [-1] * 11 + [0] * 4 + [1] * 3
    assert {s: len(data.view(s)) for s in ("train", "val", "test", "all")} == {
        "train": 8,
        "val": 10,
        "test": 10,
        "all": 18,
    }
    assert [data.where(n) for n in (0, 8, 11, 17)] == [
        "train/good/000.png",
        "test/good/000.png",
        "test/crack/000.png",
        "test/dent/002.png",
    ]
    found = whole(data, "test")
    assert found["label"].tolist() == [0] * 3 + [1] * 7
    assert found["index"].tolist() == list(range(8, 18))
    assert not found["mask"][:3].any()


def test_training_batches_have_no_masks(tmp_path, monkeypatch):
    data = ready(mvtec(tmp_path))
    read = []
    monkeypatch.setattr("penstock.datamodules.anomaly.load_mask", lambda file, *_: read.append(file))
    for batch in data.train_dataloader():
        assert set(batch) == {"image", "label", "index"}
        assert batch["image"].dtype == torch.uint8
        assert not batch["label"].any()
    assert not read
    for split in ("train", "val"):
        found = whole(ready(tmp_path, val="good"), split)
        assert set(found) == {"image", "label", "mask", "index"}
        assert not found["mask"].any()
    assert not read, "normal images have no files of masks"


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (10, 12), (23, 31)])
def test_images_and_masks_of_any_size(tmp_path, size):
    data = ready(mvtec(tmp_path), image_size=size)
    height, width = size
    found = data.view("test").fetch(np.arange(10))
    assert found["image"].shape == (10, 3, height, width)
    assert (found["mask"].shape, found["mask"].dtype) == ((10, 1, height, width), torch.uint8)
    for row, seed in enumerate((100, 101, 102, 200, 201, 202, 203, 250, 251, 252)):
        expected = picture(seed).resize((width, height), Image.Resampling.BILINEAR)
        assert np.array_equal(found["image"][row].permute(1, 2, 0).numpy(), np.asarray(expected))
        mask = nearest(marked(seed), height, width) if seed >= 200 else np.zeros(size, dtype=np.uint8)
        assert np.array_equal(found["mask"][row, 0].numpy(), mask)
    assert found["mask"].max() == 1


def test_images_are_antialiased(tmp_path):
    """A stripe of one pixel in eight, at an eighth of the size: its mean, not one of its pixels."""
    mvtec(tmp_path)
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, ::8] = 240
    Image.fromarray(pixels).save(tmp_path / "bolt" / "train" / "good" / "000.png")
    assert whole(ready(tmp_path), "train")["image"][0].add(1).mul(127.5).sub(30).abs().max() < 16


@pytest.mark.parametrize("kind", ["1", "P", "RGB", "RGBA", "I;16", "level 1"])
def test_masks_of_any_mode(tmp_path, kind):
    mvtec(tmp_path)
    mask = marked(200)
    if kind == "I;16":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 200)
    elif kind == "level 1":
        mask = marked(200, level=1)
    elif kind == "RGBA":
        mask = mask.convert("RGB").convert("RGBA")
    else:
        mask = mask.convert(kind)
    mask.save(tmp_path / "bolt" / "ground_truth" / "crack" / "000_mask.png")
    found = ready(tmp_path).view("test").fetch(np.array([3]))["mask"][0, 0]
    assert np.array_equal(found.numpy(), nearest(marked(200), 8, 8))


def test_grey_images_uppercase_suffixes_and_other_files(tmp_path):
    mvtec(tmp_path, suffix=".PNG")
    grey = picture(5, mode="L")
    grey.save(tmp_path / "bolt" / "train" / "good" / "000.PNG")
    (tmp_path / "bolt" / "train" / "good" / "._001.PNG").write_bytes(b"not an image")
    (tmp_path / "bolt" / "train" / "good" / "readme.txt").write_text("hello")
    (tmp_path / "bolt" / "license.txt").write_text("hello")
    data = ready(tmp_path, image_size=SIZE[::-1])
    assert len(data.view("train")) == 8
    found = data.view("train").fetch(np.array([0]))["image"][0]
    assert np.array_equal(found.numpy(), np.broadcast_to(np.asarray(grey), (3, *SIZE[::-1])))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_images_are_turned_upright(tmp_path, suffix):
    """A sideways image of the training and one of the test, with the mask of the upright one."""
    upright, sideways = (mvtec(tmp_path / name, suffix=suffix, size=(16, 12)) for name in ("upright", "sideways"))
    for path in ("train/good/002", "test/dent/001"):
        file = sideways / "bolt" / f"{path}{suffix}"
        image, exif = Image.open(upright / "bolt" / f"{path}{suffix}"), Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # turn by 270 degrees to see it
        image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif, quality=100, subsampling=0)
    for split in ("train", "test"):
        expected, found = (whole(ready(root, image_size=(12, 16)), split) for root in (upright, sideways))
        assert (found["image"] - expected["image"]).abs().max() <= (0.1 if suffix == ".jpg" else 0)
    assert torch.equal(found["mask"], expected["mask"])
    marked(0, (12, 16)).save(sideways / "bolt" / "ground_truth" / "dent" / "001_mask.png")
    with pytest.raises(UserError, match=r"001_mask\.png: found 12x16 pixels, expected 16x12 as"):
        ready(sideways)


def test_btad_layout(tmp_path):
    data = ready(btad(tmp_path), "01")
    assert (data.defects, [data.where(n) for n in (0, 4, 6)]) == (
        ["ko"],
        ["train/ok/0000.bmp", "test/ok/0000.bmp", "test/ko/0000.bmp"],
    )
    found = whole(data, "test")
    assert found["label"].tolist() == [0, 0, 1, 1, 1]
    assert np.array_equal(found["mask"][4, 0].numpy(), nearest(marked(202), 8, 8))


def test_visa_layout(tmp_path):
    data = ready(visa(tmp_path), "nut")
    assert (data.defects, {s: len(n) for s, n in data.numbers.items()}) == (
        ["anomaly"],
        {"train": 4, "val": 5, "test": 5},
    )
    assert [data.where(n) for n in (0, 4, 8)] == [
        "Data/Images/Normal/0000.JPG",
        "Data/Images/Normal/0004.JPG",
        "Data/Images/Anomaly/002.JPG",
    ]
    found = whole(data, "test")
    assert found["label"].tolist() == [0, 0, 1, 1, 1]
    for k in range(3):
        assert np.array_equal(found["mask"][2 + k, 0].numpy(), nearest(marked(200 + k), 8, 8))


@pytest.mark.parametrize(("make", "category"), [(mvtec, "bolt"), (visa, "nut")])
def test_data_dir_may_be_the_category(tmp_path, monkeypatch, make, category):
    expected = ready(make(tmp_path), category)
    monkeypatch.chdir(tmp_path / category)
    data = ready(".", None)
    assert [data.where(n) for n in range(5)] == [expected.where(n) for n in range(5)]
    assert data.fingerprint == expected.fingerprint


def test_masks_go_with_images_by_name(tmp_path):
    folder = mvtec(tmp_path) / "bolt"
    for name in ("1", "10", "11", "100"):
        save(picture(0), folder / "test" / "scar" / f"{name}.png")
        save(marked(int(name)), folder / "ground_truth" / "scar" / f"gt_{name}.bmp")
    data = ready(tmp_path)
    found = data.view("test").fetch(np.arange(10, 14))["mask"]
    assert [data.where(n) for n in range(18, 22)] == [f"test/scar/{name}.png" for name in ("1", "10", "100", "11")]
    for mask, name in zip(found, (1, 10, 100, 11)):
        assert np.array_equal(mask[0].numpy(), nearest(marked(name), 8, 8))


def test_penstock_data_is_looked_at(tmp_path, monkeypatch):
    mvtec(tmp_path / "mine")
    monkeypatch.setenv("PENSTOCK_DATA", str(tmp_path))
    data = Anomaly("mine", category="bolt", image_size=8)
    data.setup()
    assert len(data.view("train")) == 8


def test_halves_are_of_every_kind_and_disjoint(tmp_path):
    mvtec(tmp_path, good=7, defects=(("crack", 4), ("dent", 5), ("speck", 1)))
    data = ready(tmp_path, val="half", seed=1)
    val, test = data.numbers["val"], data.numbers["test"]
    assert not data.val_is_test
    assert sorted([*val, *test]) == list(range(8, 25))
    assert np.bincount(data.defect_of[val] + 1, minlength=4).tolist() == [3, 2, 2, 0]
    assert np.bincount(data.defect_of[test] + 1, minlength=4).tolist() == [4, 2, 3, 1]
    assert np.array_equal(val, ready(tmp_path, val="half", seed=2).numbers["val"])
    assert not np.array_equal(val, np.sort([*range(8, 11), *range(15, 17), *range(19, 21)])), "not the first ones"


def test_halves_of_nothing():
    assert [half.tolist() for half in halves(np.arange(0))] == [[], []]
    assert [half.tolist() for half in halves(np.array([3]))] == [[], [0]]


def test_validation_on_training_images(tmp_path):
    data = ready(mvtec(tmp_path), val="good", val_fraction=0.25)
    assert not data.val_is_test
    assert {s: len(n) for s, n in data.numbers.items()} == {"train": 6, "val": 2, "test": 10}
    assert sorted([*data.numbers["train"], *data.numbers["val"]]) == list(range(8))
    assert not whole(data, "val")["label"].any()


def test_shots_are_drawn_by_the_seed(tmp_path):
    mvtec(tmp_path, train=20)
    drawn = {(k, seed): set(ready(tmp_path, shots=k, seed=seed).numbers["train"]) for k in (2, 5) for seed in range(6)}
    assert all(len(found) == k for (k, _), found in drawn.items())
    assert all(drawn[2, seed] < drawn[5, seed] for seed in range(6)), "fewer are among more"
    assert len({frozenset(found) for found in drawn.values()}) == 12
    assert set(ready(tmp_path, shots=5, seed=3).numbers["train"]) == drawn[5, 3]
    data = ready(tmp_path, shots=5, val="good", val_fraction=0.5)
    assert not set(data.numbers["train"]) & set(data.numbers["val"])
    assert {s: len(n) for s, n in data.numbers.items()} == {"train": 5, "val": 10, "test": 10}


def test_a_test_without_anomalies_is_allowed(tmp_path):
    data = ready(mvtec(tmp_path, defects=()))
    found = whole(data, "test")
    assert (data.defects, found["label"].tolist()) == ([], [0, 0, 0])
    assert not found["mask"].any()


@pytest.mark.parametrize(("memory_gb", "workers"), [(4.0, 2), (0.0, 0), (0.0, 2)])
def test_memory_and_workers_give_the_same_batches(tmp_path, memory_gb, workers):
    mvtec(tmp_path)
    expected, found = ready(tmp_path), ready(tmp_path, memory_gb=memory_gb, num_workers=workers)
    assert (expected.store.kept is None, found.store.kept is None) == (False, memory_gb == 0)
    for loader in ("train_dataloader", "test_dataloader", "reference_dataloader"):
        for a, b in zip(getattr(expected, loader)(), getattr(found, loader)(), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_ranks_share_the_batches(tmp_path, attach):
    mvtec(tmp_path, good=4)
    for loader in ("train_dataloader", "val_dataloader"):
        one = list(getattr(attach(ready(tmp_path, batch_size=4, seed=3)), loader)())
        shares = [
            list(getattr(attach(ready(tmp_path, batch_size=4, seed=3), rank=rank, world=2), loader)())
            for rank in (0, 1)
        ]
        for batch, a, b in zip(one, *shares, strict=True):
            assert all(torch.equal(batch[key], torch.cat((a[key], b[key]))) for key in batch)


def test_flips_and_turns_are_keyed_and_only_in_training(tmp_path, attach):
    data = attach(ready(mvtec(tmp_path, train=32), flip=True, rotate=True, batch_size=32, seed=4), epoch=3)
    assert data.augments
    batch = next(iter(data.train_dataloader()))
    plain = batch["image"].float() / 127.5 - 1
    image = data.on_after_batch_transfer(batch, 0)["image"]
    draws = Draws(4, 3, batch["index"])
    mirrored, quarters = draws.uniform("flip") < 0.5, (draws.uniform("rotate") * 4).long()
    assert len({(bool(m), int(q)) for m, q in zip(mirrored, quarters)}) == 8, "all eight come"
    for x, y, mirror, quarter in zip(plain, image, mirrored, quarters):
        x = torch.from_numpy(np.rot90(x.flip(-1) if mirror else x, int(quarter), axes=(1, 2)).copy())
        torch.testing.assert_close(y, x, atol=1e-6, rtol=0)
    attach(data, training=False)
    torch.testing.assert_close(data.on_after_batch_transfer(batch, 0)["image"], plain, atol=1e-6, rtol=0)
    assert not ready(tmp_path).augments


def test_fingerprint_changes_with_content_and_settings(tmp_path):
    mvtec(tmp_path)
    base = ready(tmp_path).fingerprint
    assert ready(tmp_path, seed=9, num_workers=1).fingerprint == base
    settings = [{"image_size": 4}, {"image_size": (8, 4)}, {"val": "half"}, {"val": "good"}, {"shots": 3}]
    settings += [{"shots": 3, "seed": 5}, {"flip": True}, {"rotate": True}]
    prints = {ready(tmp_path, **s).fingerprint for s in settings}
    marked(7).save(tmp_path / "bolt" / "ground_truth" / "crack" / "000_mask.png")
    prints.add(ready(tmp_path).fingerprint)
    picture(7).save(tmp_path / "bolt" / "train" / "good" / "000.png")
    prints.add(ready(tmp_path).fingerprint)
    assert len(prints | {base}) == len(settings) + 3


@pytest.mark.parametrize(
    ("words", "kind", "shape"),
    [
        (["data=magnetic_tile"], "magnetic_tile/tile", (256, 256)),
        (["data=mvtec", "data.category=screw", "image_size=32"], "mvtec/screw", (32, 32)),
        (["data=visa", "shape=[3,32,48]"], "visa/candle", (32, 48)),
        (["data=btad", "data.category=02", "data.image_size=24"], "btad/02", (24, 24)),
    ],
)
def test_the_words_of_the_command_line(words, kind, shape):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(KindDataModule, "data")
    tree, _ = compose(words)
    data = parser.instantiate_classes(parser.parse_object({"data": tree["data"]})).data
    assert (f"{data.name}/{data.category}", (data.height, data.width)) == (kind, shape)


@needs_tiles
def test_magnetic_tiles():
    data = ready(TILES, "tile", image_size=64, memory_gb=0)
    assert len(data.view("train")) == 714
    counts = {name: int((data.defect_of == k).sum()) for k, name in enumerate(data.defects)}
    assert counts == {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 99}
    assert (data.defect_of[data.numbers["test"]] < 0).sum() == 238
    rows = np.linspace(0, 625, 40).astype(int)
    found = data.view("test").fetch(rows)
    for image, mask, number in zip(found["image"], found["mask"], found["index"].tolist()):
        file = TILES / "tile" / data.where(number)
        expected = Image.open(file).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))
        truth = TILES / "tile" / "ground_truth" / file.parent.name / f"{file.stem}_mask.png"
        assert truth.exists() == (data.defect_of[number] >= 0)
        mask = mask[0].numpy()
        assert np.array_equal(mask, nearest(Image.open(truth), 64, 64) if truth.exists() else np.zeros_like(mask))
