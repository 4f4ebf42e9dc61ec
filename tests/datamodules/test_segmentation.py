"""Images with masks of classes: layouts, numbers of classes, sizes, crops, orders; the embedded scenes."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from penstock.datamodules.detection_transforms import Resizing
from penstock.datamodules.digit_masks import DigitMasks
from penstock.datamodules.digit_scenes import draw_scene, shares
from penstock.datamodules.segmentation import Segmentation
from penstock.datamodules.segmentation_sources import numbering, read_mask
from penstock.datamodules.segmentation_transforms import TRIES, Cropping, cropped, distorted, place, resized_mask
from tests.mask_trees import SIZES, mask_tree, save

ADE = {"classes": ["a", "b", "c", "d"], "reduce_zero_label": True}
SMALL = {"min_size": 32, "max_size": 64, "crop_size": 32, "batch_size": 2}


def ready(root, **options):
    data = Segmentation(**{**ADE, **SMALL, "name": "mine", "data_dir": str(root), **options})
    data.setup()
    return data


def test_ade_numbers():
    """0 and 255 count for nothing, 1 to 150 are classes 0 to 149."""
    table = numbering(150, 255, True)
    assert table[[0, 255]].tolist() == [255, 255]
    assert table[1:151].tolist() == list(range(150))
    assert (table[151:255] == -1).all()
    plain = numbering(19, 250, False)
    assert plain[:19].tolist() == list(range(19))
    assert plain[0] == 0
    assert [plain[250], plain[255], plain[19]] == [255, -1, -1]


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16"])
def test_values_of_a_mask_are_read_whatever_their_kind(tmp_path, mode):
    values = np.random.default_rng(0).integers(0, 5, size=(6, 7)).astype(np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([*range(255, -1, -1)] * 3)
    elif mode != "L":
        image = Image.fromarray(values.astype({"I": np.int32, "I;16": np.uint16}[mode]))
    assert image.mode == mode
    file = tmp_path / ("m.tif" if mode == "I" else "m.png")
    image.save(file)
    found = read_mask(file, numbering(4, 255, True))
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.where(values == 0, 255, values - 1))


def test_evaluation_sees_whole_images(tmp_path):
    data = ready(mask_tree(tmp_path), eval_batch_size=3)
    assert (data.shape, data.num_classes, data.class_names, data.val_is_test) == ((3, 32, 32), 4, list("abcd"), True)
    assert data.where(8) == "images/validation/validation_0000.jpg"
    (batch,) = data.reference_dataloader("val")
    assert batch["original_size"].tolist() == [list(size) for size in SIZES[:3]]
    assert batch["size"].tolist() == [[32, 51], [45, 32], [32, 32]]
    assert batch["image"].shape == (3, 3, 45, 51)
    assert batch["mask"].shape == (3, 56, 64)
    assert batch["mask"].dtype == torch.uint8
    for k, ((height, width), (rows, columns)) in enumerate(zip(SIZES, batch["size"].tolist())):
        raw = np.asarray(Image.open(tmp_path / f"annotations/validation/validation_{k:04d}.png"))
        mask = batch["mask"][k].numpy()
        assert np.array_equal(mask[:height, :width], np.where(raw == 0, 255, raw - 1))
        assert (mask[height:] == 255).all()
        assert (mask[:, width:] == 255).all()
        image = batch["image"][k]
        assert (image[:, rows:] == 0).all()
        assert (image[:, :, columns:] == 0).all()
        assert -1 <= image.min() < image.max() <= 1


@pytest.mark.parametrize(
    ("patterns", "options"),
    [
        ({}, {}),
        ({"images": "{split}/photos/{name}.png", "masks": "{split}/gt/{name}_mask.png"}, {"mask_suffix": "_mask"}),
        ({"images": "photos/{split}/sub/{name}.jpg", "masks": "gt/{split}/sub/{name}.tif"}, {}),
    ],
)
def test_layouts(tmp_path, patterns, options):
    mask_tree(tmp_path, **patterns)
    if patterns:
        options = {"images": "photos", "masks": "gt", **options}
    data = ready(tmp_path, **options)
    assert {split: len(numbers) for split, numbers in data.numbers.items()} == {"train": 8, "val": 3, "test": 0}


def test_files_without_splits(tmp_path):
    mask_tree(tmp_path, (("x", 10),), images="images/{name}.jpg", masks="annotations/{name}.png")
    data, other = ready(tmp_path, val_fraction=0.2), ready(tmp_path, val_fraction=0.2, seed=3)
    assert [len(data.numbers[split]) for split in ("train", "val", "test")] == [8, 2, 0]
    assert np.array_equal(data.numbers["val"], other.numbers["val"])
    assert data.fingerprint == other.fingerprint != ready(tmp_path).fingerprint


def test_test_images_without_masks_are_not_there(tmp_path):
    mask_tree(tmp_path)
    save(np.zeros((9, 9, 3), dtype=np.uint8), tmp_path / "images" / "testing" / "a.jpg")
    assert not len(ready(tmp_path).numbers["test"])


def batches(data):
    return list(data.train_dataloader())


@pytest.mark.parametrize("memory_gb", [0, 1])
def test_crops_depend_on_seed_epoch_and_number_alone(tmp_path, attach, memory_gb):
    mask_tree(tmp_path)

    def at(epoch, batch_size=2, **options):
        data = attach(ready(tmp_path, batch_size=batch_size, memory_gb=memory_gb, seed=1), epoch=epoch, **options)
        return {int(n): (b["image"][k], b["mask"][k]) for b in batches(data) for k, n in enumerate(b["index"])}

    def same(a, b):
        return all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n]))

    one = at(4)
    assert len(one) == 8
    assert same(one, at(4, batch_size=4))
    halves = at(4, rank=0, world=2) | at(4, rank=1, world=2)
    assert same(one, halves)
    assert not same(one, at(5))


def test_crops_in_batches(tmp_path, attach):
    data = attach(ready(mask_tree(tmp_path), ratio=(0.5, 0.9), num_workers=1))
    raw = next(iter(data.train_dataloader()))
    assert raw["image"].shape == (2, 3, 32, 32)
    assert raw["mask"].shape == (2, 32, 32)
    image = data.on_after_batch_transfer(raw, 0)["image"]
    for k, (height, width) in enumerate(raw["size"].tolist()):
        assert min(height, width) < 32
        assert (raw["mask"][k, height:] == 255).all()
        assert (raw["mask"][k, :, width:] == 255).all()
        assert (image[k, :, height:] == 0).all()
        assert (image[k, :, :, width:] == 0).all()
        assert (image[k, :, :height, :width] != 0).any()


def test_image_and_mask_go_together():
    """The picture tells the class by its colour, so that what is cut, enlarged and mirrored can be compared."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 4, size=(5, 6))).to(torch.uint8)
    mask = coarse.repeat_interleave(16, 0).repeat_interleave(16, 1)
    image = (mask * 60)[None].expand(3, -1, -1)
    how = Cropping(32, (0.8, 1.6), 1.0, flip=True, distort=False)
    flips = 0
    for seed in range(20):
        square, classes, (height, width) = cropped(image, mask, Resizing((80,), 96), how, np.random.default_rng(seed))
        assert (height, width) == (32, 32)
        agree = (square[0].float() / 60 - classes.float()).abs() < 0.5
        assert agree.float().mean() > 0.93, "all but edges, where colours are between"
        other = (square[0].flip(-1).float() / 60 - classes.float()).abs() < 0.5
        flips += bool(other.float().mean() < 0.8)
    assert flips > 15


def test_no_class_has_more_than_its_share():
    """A crop is drawn again where one class has three quarters, or is alone; ignored pixels do not count."""
    mask = torch.zeros(64, 200, dtype=torch.uint8)
    mask[:, 150:] = 1
    mask[:, 190:] = 255
    how, plain = Cropping(64), Cropping(64, most=1.0)

    def shares_of(settings):
        found = []
        for seed in range(200):
            _, x = place(mask, settings, np.random.default_rng(seed))
            counts = torch.bincount(mask[:, x : x + 64].flatten(), minlength=256)[:2]
            found.append(float(counts.max() / counts.sum()))
        return np.array(found)

    assert (shares_of(how) >= 0.75).mean() < 0.04
    assert (shares_of(plain) == 1).mean() < 0.01
    assert (shares_of(plain) >= 0.75).mean() > 0.2
    draws = np.random.default_rng(0)
    place(torch.zeros(64, 200, dtype=torch.uint8), how, draws)
    other = np.random.default_rng(0)
    for _ in range(TRIES + 1):
        other.integers(0, 1)
        other.integers(0, 137)
    assert draws.random() == other.random(), "eleven places are drawn where none will do"


def test_masks_are_resized_by_the_nearest_pixel():
    mask = torch.arange(12, dtype=torch.uint8).view(3, 4)
    assert torch.equal(resized_mask(mask, (6, 8)), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(resized_mask(resized_mask(mask, (9, 12)), (3, 4)), mask)
    assert resized_mask(mask, (3, 4)) is mask


def test_colours_change_within_bounds():
    grey = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    levels = np.array([distorted(grey, np.random.default_rng(seed)).float().mean() for seed in range(300)])
    assert (levels == 100).mean() == pytest.approx(0.25, abs=0.08), "neither brightness nor contrast"
    assert levels.min() >= (100 - 32) * 0.5 - 1
    assert levels.max() <= (100 + 32) * 1.5 + 1
    assert np.ptp(levels) > 80
    red = torch.tensor([200, 40, 40], dtype=torch.uint8).view(3, 1, 1)
    assert len({tuple(distorted(red, np.random.default_rng(k)).flatten().tolist()) for k in range(40)}) > 25
    assert torch.equal(distorted(red, np.random.default_rng(1)), distorted(red, np.random.default_rng(1)))


def test_digit_masks():
    data, other = DigitMasks(scenes=40, batch_size=8), DigitMasks(scenes=40, batch_size=8, seed=5)
    for one in (data, other):
        one.setup()
    assert data.fingerprint == other.fingerprint
    assert (data.shape, data.num_classes, data.class_names[:2]) == ((3, 128, 128), 11, ["background", "0"])
    assert [data.where(k) for k in (0, 40, 59)] == ["train/00001", "val/00001", "test/00010"]
    inks, labels = load_digits(return_X_y=True)
    inks = inks.reshape(-1, 8, 8) / 16
    batch = data.store.fetch(data.numbers["test"])
    for k in range(10):
        scene = draw_scene(np.random.default_rng((2, k)), inks, shares(len(inks))[2], 128)
        assert np.array_equal(batch["image"][k].permute(1, 2, 0).numpy(), scene.picture)
        mask = batch["mask"][k].numpy()
        for n, ((x1, y1, x2, y2), digit) in enumerate(zip(scene.boxes, scene.digits), 1):
            own = np.argwhere(scene.mask == n)
            assert ((own >= (y1, x1)) & (own < (y2, x2))).all(), "ink lies in its box"
            assert len(own) > 10
            assert set(mask[scene.mask == n]) == {labels[digit] + 1}
        assert (mask[scene.mask == 0] == 0).all()
