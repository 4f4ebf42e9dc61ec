"""One class as the normal one, and digits with defects in known places."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from sklearn.datasets import load_digits

from penstock.datamodules.base import KindDataModule
from penstock.datamodules.digits import Digits
from penstock.datamodules.images import Images
from penstock.datamodules.moving_digits import MovingDigits
from penstock.datamodules.one_class import OneClass, enlarged
from penstock.datamodules.points import Points
from penstock.datamodules.spoiled_digits import DEFECTS, SpoiledDigits, spoil
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError

CIFAR = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not at ../shared/data/cifar10")


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def one_class(normal=0, fraction=0.4, **options):
    return ready(OneClass(Digits(val_fraction=fraction, batch_size=32), normal, **options))


def whole(data, split):
    batches = list(data.reference_dataloader(split))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_digits_of_one_class():
    data, classes = one_class(3), load_digits().target
    assert (data.shape, data.num_classes, data.class_names) == ((3, 8, 8), 0, ["normal", "anomalous"])
    assert (data.defects, data.val_is_test) == (["0", "1", "2", "4", "5", "6", "7", "8", "9"], False)
    assert [data.defects[k] if k >= 0 else "3" for k in data.defect_of] == [str(c) for c in classes]
    train, val, test = (data.numbers[split] for split in ("train", "val", "test"))
    held = ready(Digits(val_fraction=0.4)).numbers["val"]
    assert sorted([*val, *test]) == held.tolist()
    assert set(train) == set(np.flatnonzero(classes == 3)) - set(held)
    counts = [np.bincount(classes[part], minlength=10) for part in (val, test)]
    assert ((counts[1] - counts[0]) >> 1 == 0).all(), "halves of every class"
    assert data.where(int(test[0])) == f"{classes[test[0]]}/{test[0]:05d}"


def test_batches_have_labels_and_no_masks():
    data, classes = one_class("3"), load_digits().target
    for batch in data.train_dataloader():
        assert set(batch) == {"image", "label", "index"}
        assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (32, 3, 8, 8))
        assert not batch["label"].any()
    for split in ("val", "test"):
        found = whole(data, split)
        assert set(found) == {"image", "label", "index"}
        assert np.array_equal(found["label"].numpy(), classes[found["index"]] != 3)
        assert (found["image"].min(), found["image"].max()) == (-1, 1)
        assert torch.equal(found["image"][:, 0], found["image"][:, 2])


def test_levels_become_256():
    data = one_class()
    found = whole(data, "test")
    expected = load_digits().images[found["index"]] / 8 - 1
    assert np.abs(found["image"][:, 1].numpy() - expected).max() <= 1 / 255 + 1e-6
    assert data.levels == 256


def test_images_are_enlarged():
    data = one_class(image_size=(16, 24))
    assert data.shape == (3, 16, 24)
    found = data.view("test").fetch(np.arange(5))
    assert found["image"].shape == (5, 3, 16, 24)
    for image, number in zip(found["image"], found["index"]):
        digit = Image.fromarray((load_digits().images[number] * 255 / 16).astype(np.float32))
        expected = np.asarray(digit.resize((24, 16), Image.Resampling.BILINEAR))
        assert np.abs(image[0].numpy() - expected).max() <= 0.51


def test_images_as_they_are_stay_bit_for_bit():
    raw = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(enlarged(raw, 256, (5, 7)), raw)
    assert torch.equal(
        enlarged(torch.arange(17).view(17, 1, 1, 1), 17, (1, 1))[[0, 8, 16], 0, 0, 0], torch.tensor([0, 128, 255])
    )


def test_validation_on_the_test():
    data = one_class(val="test")
    assert data.val_is_test
    assert np.array_equal(data.numbers["val"], data.numbers["test"])
    assert len(data.numbers["test"]) == round(1797 * 0.4)


def test_sizes_and_augmentations_are_those_of_the_data(attach):
    inner = Digits(batch_size=9, eval_batch_size=7, num_workers=1, seed=5, dequantise=True)
    for own, sizes in (({}, (9, 7)), ({"batch_size": 4}, (4, 4)), ({"batch_size": 4, "eval_batch_size": 5}, (4, 5))):
        data = OneClass(inner, **own)
        assert (data.batch_size, data.eval_batch_size, data.num_workers, data.seed) == (*sizes, 1, 5)
        assert data.augments
    assert not OneClass(Digits()).augments
    data = attach(ready(data))
    batch = next(iter(data.train_dataloader()))
    noisy = data.on_after_batch_transfer(batch, 0)["image"]
    assert 0 < (noisy - batch["image"].float() / 128 + 1).abs().max() < 1 / 128


def test_ranks_share_the_batches(attach):
    for loader in ("train_dataloader", "test_dataloader"):
        one = list(getattr(attach(one_class(image_size=12)), loader)())
        shares = [list(getattr(attach(one_class(image_size=12), rank=rank, world=2), loader)()) for rank in (0, 1)]
        for batch, a, b in zip(one, *shares, strict=True):
            assert all(torch.equal(batch[key], torch.cat((a[key], b[key]))) for key in batch)


def tree(root, splits):
    for split in splits:
        for k, name in enumerate(("cat", "dog-wolf", "eel")):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (k * 50, i * 20, 0)).save(root / split / name / f"{i}.png")
    return Images("pets", str(root), batch_size=2)


def test_splits_of_the_data_are_kept(tmp_path):
    data = ready(OneClass(tree(tmp_path / "a", ("train", "val", "test")), "eel"))
    assert data.numbers["train"].tolist() == [8, 9, 10, 11]
    assert data.numbers["val"].tolist() == list(range(12, 24))
    assert data.numbers["test"].tolist() == list(range(24, 36))
    data = ready(OneClass(tree(tmp_path / "b", ("train", "test")), 1))
    assert sorted([*data.numbers["val"], *data.numbers["test"]]) == list(range(12, 24))
    assert np.bincount(data.defect_of[data.numbers["val"]] + 1).tolist() == [2, 2, 2]
    assert (data.where(5), data.where(8)) == ("dog-wolf/00005", "eel/00008")


@needs_cifar
def test_cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PENSTOCK_DATA", str(CIFAR.parent))
    inner = Images("uoft-cs/cifar10", val_fraction=0.02, memory_gb=0)
    data = ready(OneClass(inner, "cat", image_size=48, batch_size=4))
    counts = {split: np.bincount(data.defect_of[n] < 0, minlength=2).tolist() for split, n in data.numbers.items()}
    assert counts["test"] == [9000, 1000]
    assert counts["train"][0] == 0
    assert counts["train"][1] + counts["val"][1] == 5000
    assert sum(counts["val"]) == 1000
    rows = pq.read_table(next(CIFAR.rglob("test-*.parquet"))).slice(0, 4).to_pylist()
    found = data.view("test").fetch(np.arange(4))
    assert found["label"].tolist() == [int(row["label"] != 3) for row in rows]
    for image, row in zip(found["image"], rows):
        picture = Image.open(io.BytesIO(row["img"]["bytes"])).resize((48, 48), Image.Resampling.BILINEAR)
        assert np.abs(image.permute(1, 2, 0).numpy() - np.asarray(picture).astype(float)).max() <= 1


def test_mistakes_are_named(tmp_path):
    with pytest.raises(
        UserError, match=r"^data\.normal: no class 'eal'; found cat, dog-wolf, eel \(did you mean 'eel'"
    ):
        ready(OneClass(tree(tmp_path / "a", ("train", "test")), "eal"))
    for normal in (-1, 10, "ten"):
        with pytest.raises(UserError, match=rf"^data\.normal: no class '{normal}'; found 0, 1, "):
            one_class(normal)
    with pytest.raises(UserError, match=r"^data\.data: holds out no images to test on; set data\.data\.val_fraction"):
        one_class(fraction=0.0)
    with pytest.raises(UserError, match=r"^data\.data: Points has samples of shape \(2,\); expected grey or RGB"):
        ready(OneClass(Points()))
    with pytest.raises(UserError, match=r"^data\.data: MovingDigits has samples of shape \(4, 1, 16, 16\); expected"):
        ready(OneClass(MovingDigits(frames=4)))
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    flat = Images("pets", str(tmp_path), batch_size=1)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match=r"^data\.data: Images has no classes; expected images with classes$"):
        ready(OneClass(flat))
    with pytest.raises(
        UserError, match=r"^data\.val: found 'tset', expected one of test, half \(did you mean 'test'\?"
    ):
        OneClass(Digits(), val="tset")
    with pytest.raises(UserError, match=r"^data\.image_size: found 0"):
        OneClass(Digits(), image_size=0)


def test_fingerprints_count_settings():
    options = ({}, {"normal": 1}, {"image_size": 16}, {"val": "test"}, {"fraction": 0.3})
    assert len({one_class(**o).fingerprint for o in options}) == len(options)
    options = ({}, {"digit": 3}, {"image_size": 16}, {"val_fraction": 0.3})
    assert len({ready(SpoiledDigits(**o)).fingerprint for o in options}) == len(options)


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_changes_what_it_says(defect):
    for number, digit in enumerate(load_digits().images[:200].astype(np.uint8)):
        made = spoil(digit, defect, np.random.default_rng(number))
        changed = np.argwhere(made != digit)
        assert len(changed) > 0
        assert np.array_equal(made, spoil(digit, defect, np.random.default_rng(number)))
        assert set(made[made != digit]) == {0 if defect == "gap" else 16}
        extent = sorted((changed.max(0) - changed.min(0) + 1).tolist())
        assert extent[0] == 1 if defect == "scratch" else extent[1] <= 3


def test_spoiled_digits_have_masks_where_they_were_changed():
    data, digits = ready(SpoiledDigits(image_size=(16, 24))), load_digits().images
    assert (data.shape, data.defects, data.val_is_test) == ((3, 16, 24), list(DEFECTS), False)
    train, val, test = (data.numbers[split] for split in ("train", "val", "test"))
    assert sorted([*train, *val, *test]) == list(range(1797))
    assert (data.defect_of[train] < 0).all()
    for part in (val, test):
        assert np.abs(np.bincount(data.defect_of[part] + 1) - [180, 60, 60, 60]).max() <= 1
    found = whole(data, "test")
    assert (found["mask"].shape[1:], found["mask"].dtype) == ((1, 16, 24), torch.uint8)
    marked = found["mask"].flatten(1).any(1)
    assert torch.equal(marked.long(), found["label"])
    small = data.store.digits[found["index"]][:, 0].numpy()
    expected = (small != digits[found["index"]]).repeat(2, 1).repeat(3, 2)
    assert np.array_equal(found["mask"][:, 0].numpy(), expected)
    assert all(set(batch) == {"image", "label", "index"} for batch in data.train_dataloader())
    kinds = {data.where(n).split("/")[0] for n in test}
    assert kinds == {"good", *DEFECTS}
    assert len({data.where(n) for n in range(1797)}) == 1797


def test_spoiled_digits_of_one_kind_are_the_same_for_every_seed():
    data, again = ready(SpoiledDigits(digit=4, seed=1)), ready(SpoiledDigits(digit=4, seed=2))
    assert {data.where(n)[-1] for n in data.numbers["test"]} == {"4"}
    assert data.fingerprint == again.fingerprint
    assert sum(map(len, data.numbers.values())) == int((load_digits().target == 4).sum())
    with pytest.raises(UserError, match=r"^data\.digit: found 10, expected 0 \.\. 9$"):
        SpoiledDigits(digit=10)
    with pytest.raises(UserError, match=r"^data\.val_fraction: found 0, expected a number in \(0, 1\)$"):
        SpoiledDigits(val_fraction=0)


@pytest.mark.parametrize(
    ("words", "kind", "shape"),
    [
        (["data=digits_one_class", "data.normal=7"], OneClass, (3, 64, 64)),
        (["data=digits_spoiled", "image_size=32"], SpoiledDigits, (3, 32, 32)),
    ],
)
def test_the_words_of_the_command_line(words, kind, shape):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(KindDataModule, "data")
    tree, _ = compose(words)
    data = ready(parser.instantiate_classes(parser.parse_object({"data": tree["data"]})).data)
    assert (type(data), data.shape) == (kind, shape)
    assert whole(data, "val")["image"].shape[1:] == shape
