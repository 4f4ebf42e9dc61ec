import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from penstock.datamodules.image_sources import TableSource
from penstock.datamodules.images import Images
from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError

CIFAR = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason="CIFAR-10 is not at ../shared/data/cifar10")
CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed, size=(8, 8), mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8))


def encoded(image, kind="PNG"):
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def tree(root, count=6, classes=("cat", "dog"), **options):
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(100 * k + i, **options).save(root / name / f"{i:02d}.png")
    return root


def parquet(folder, columns, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")
    return folder


def ready(folder=None, **options):
    options = {"name": "mine", "batch_size": 2} | options
    data = Images(data_dir=str(folder) if folder else None, **options)
    data.prepare_data()
    data.setup()
    return data


def raw(data, split="train"):
    return data.view(split).fetch(np.arange(len(data.view(split))))


@needs_cifar
def test_cifar10_through_the_hub_layout(tmp_path):
    data = ready(CIFAR, name="uoft-cs/cifar10", limit=40, val_fraction=0.5, eval_batch_size=16)
    assert (data.shape, data.num_classes, data.class_names) == ((3, 32, 32), 10, CIFAR_NAMES)
    assert {s: len(data.view(s)) for s in ("train", "val", "test", "all")} == {
        "train": 40,
        "val": 40,
        "test": 40,
        "all": 120,
    }
    for split, file, first in (("train", "train", 0), ("test", "test", 50_000)):
        table = pq.read_table(next(CIFAR.rglob(f"{file}-*.parquet")))
        found = raw(data, split)
        for image, label, index in zip(found["image"], found["label"], found["index"]):
            row = table.slice(index.item() - first, 1).to_pylist()[0]
            expected = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
            assert label.item() == row["label"]
            assert row["img"]["path"].startswith(CIFAR_NAMES[label])
    full = ready(CIFAR, name="uoft-cs/cifar10", memory_gb=0.0)
    assert (len(full.view("train")), len(full.view("test")), len(full.view("all"))) == (50_000, 10_000, 60_000)
    assert full.fingerprint != data.fingerprint


def test_penstock_data_is_looked_at(tmp_path, monkeypatch):
    tree(tmp_path / "pets")
    monkeypatch.setenv("PENSTOCK_DATA", str(tmp_path))
    assert ready(name="owner/pets").class_names == ["cat", "dog"]


def test_tree_with_splits(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "valid", count=2)
    tree(tmp_path / "test", count=3)
    data = ready(tmp_path)
    assert {s: len(data.view(s)) for s in ("train", "val", "test", "all")} == {
        "train": 12,
        "val": 4,
        "test": 6,
        "all": 22,
    }
    found = raw(data, "train")
    assert found["label"].tolist() == [0] * 6 + [1] * 6
    expected = np.asarray(picture(103)).transpose(2, 0, 1)
    assert np.array_equal(found["image"][9].numpy(), expected)
    assert raw(data, "test")["index"].tolist() == list(range(16, 22))
    with pytest.raises(UserError, match=r"data.val_fraction: 'mine' has a validation split of its own"):
        ready(tmp_path, val_fraction=0.1)


def test_flat_folder_has_no_labels(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    data = ready(tmp_path)
    assert data.num_classes == 0
    assert set(raw(data)) == {"image", "index"}


def test_held_out_images_are_fixed_and_disjoint(tmp_path):
    tree(tmp_path, count=10)
    data = ready(tmp_path, val_fraction=0.2, seed=1)
    assert (len(data.view("train")), len(data.view("val"))) == (16, 4)
    assert sorted([*data.numbers["train"], *data.numbers["val"]]) == list(range(20))
    assert np.array_equal(data.numbers["val"], ready(tmp_path, val_fraction=0.2, seed=2).numbers["val"])


def test_limit_reaches_all_classes(tmp_path):
    data = ready(tree(tmp_path), limit=4)
    assert raw(data)["index"].tolist() == [0, 3, 6, 9]


def test_class_subset_is_renumbered(tmp_path):
    data = ready(tree(tmp_path, classes=("ant", "bee", "cow")), classes=["cow", "ant"])
    assert (data.num_classes, data.class_names) == (2, ["cow", "ant"])
    found = raw(data)
    assert found["label"].tolist() == [1] * 6 + [0] * 6
    assert found["index"].tolist() == [*range(6), *range(12, 18)]
    with pytest.raises(UserError, match=r"data.classes: no class 'cows'; found ant, bee, cow \(did you mean 'cow'\?\)"):
        ready(tmp_path, classes=["cows"])


def test_resize_keeps_the_centre(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = raw(ready(tmp_path, image_size=10, batch_size=1))["image"][0]
    assert image.shape == (3, 10, 10)
    assert image[:, :, 1:-1].float().sub(200).abs().max() <= 2


def test_flips_are_keyed_and_only_in_training(tmp_path, attach):
    data = attach(ready(tree(tmp_path), flip=True, batch_size=12, seed=4), epoch=3)
    batch = next(iter(data.train_dataloader()))
    plain = batch["image"].float() / 127.5 - 1
    image = data.on_after_batch_transfer(batch, 0)["image"]
    mirrored = Draws(4, 3, batch["index"]).uniform("flip") < 0.5
    assert 0 < mirrored.sum() < 12
    for x, y, flip in zip(plain, image, mirrored):
        torch.testing.assert_close(y, x.flip(-1) if flip else x, atol=1e-6, rtol=0)
    attach(data, training=False)
    torch.testing.assert_close(data.on_after_batch_transfer(batch, 0)["image"], plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("memory_gb", [0.0, 4.0])
def test_memory_and_workers_give_the_same_batches(tmp_path, memory_gb):
    tree(tmp_path)
    expected = list(ready(tmp_path).train_dataloader())
    found = list(ready(tmp_path, memory_gb=memory_gb, num_workers=2).train_dataloader())
    assert len(expected) == len(found) == 6
    assert all(torch.equal(a[key], b[key]) for a, b in zip(expected, found) for key in ("image", "label", "index"))


def test_grey_and_converted_images(tmp_path):
    tree(tmp_path, mode="L")
    assert raw(ready(tmp_path, channels=1))["image"].shape == (12, 1, 8, 8)
    assert raw(ready(tmp_path, channels=3, convert=True))["image"].shape == (12, 3, 8, 8)


def test_deep_images_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep.png: found I;16 pixels, expected 8 bits a channel"):
        raw(ready(tmp_path, channels=1, convert=True))


def test_fingerprint_changes_with_content_and_settings(tmp_path):
    tree(tmp_path)
    base = ready(tmp_path).fingerprint
    assert ready(tmp_path, seed=9, num_workers=1).fingerprint == base
    settings = [
        {"image_size": 4},
        {"limit": 3},
        {"val_fraction": 0.2},
        {"flip": True},
        {"channels": 1, "convert": True},
    ]
    settings.append({"classes": ["dog", "cat"]})
    prints = {ready(tmp_path, **s).fingerprint for s in settings}
    picture(999).save(tmp_path / "cat" / "00.png")
    prints.add(ready(tmp_path).fingerprint)
    assert len(prints | {base}) == len(settings) + 2


def test_labels_and_columns_of_parquet(tmp_path):
    cells = [{"bytes": encoded(picture(i)), "path": f"{i}.png"} for i in range(4)]
    named = parquet(tmp_path / "a", {"picture": cells, "category": ["owl", "ant", "owl", "ant"]})
    data = ready(named)
    assert data.class_names == ["ant", "owl"]
    assert raw(data)["label"].tolist() == [1, 0, 1, 0]
    odd = parquet(tmp_path / "b", {"photograph": cells, "kind": [0, 1, 2, 1]})
    with pytest.raises(UserError, match=r"no image column; found photograph, kind, expected one of image, img,"):
        ready(odd)
    with pytest.raises(UserError, match=r"data.image_column: .* no column 'photographs'; .*did you mean 'photograph'"):
        ready(odd, image_column="photographs")
    data = ready(odd, image_column="photograph", label_column="kind")
    assert data.num_classes == 3
    numbers = parquet(tmp_path / "c", {"image": [1, 2], "label": [0, 1]})
    with pytest.raises(UserError, match=r"row 0: column 'image' holds int, expected an encoded image"):
        ready(numbers)
    missing = parquet(tmp_path / "d", {"image": cells, "label": [0, 1, -1, 0]})
    with pytest.raises(UserError, match=r"column 'label' holds -1 .. 1, expected 0 .. 1"):
        ready(missing)


def test_corrupt_parquet_and_missing_train_split(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a: cannot read its parquet files \("):
        ready(tmp_path / "a")
    parquet(tmp_path / "b", {"image": [{"bytes": encoded(picture(0)), "path": ""}]}, split="test")
    with pytest.raises(UserError, match=r"b: no split called train; found test"):
        ready(tmp_path / "b")


def test_paths_in_parquet_stay_in_the_folder(tmp_path):
    picture(0).save(tmp_path / "secret.png")
    inside = parquet(tmp_path / "data", {"image": [{"bytes": None, "path": "inside.png"}] * 2})
    picture(1).save(inside / "inside.png")
    source = TableSource(_table(inside), "data", inside, "image", None)
    assert source.open(0).size == (8, 8)
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(UserError, match=r"row 0: path '.*secret.png' leaves the data folder"):
            source._inside(path, 0)


def _table(folder):
    import datasets

    return datasets.load_dataset(str(folder), split="train")


@pytest.mark.parametrize(("memory_gb", "workers"), [(4.0, 0), (0.0, 0), (0.0, 2)])
def test_truncated_jpeg_is_named(tmp_path, memory_gb, workers):
    for i in range(4):
        picture(i, size=(32, 32)).save(tmp_path / f"{i}.jpg")
    whole = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2])
    data = ready(tmp_path, memory_gb=memory_gb, num_workers=workers)
    line = rf"^{tmp_path}/2.jpg: cannot read the image \(OSError: [^:]*\); expected a complete image$"
    with pytest.raises(UserError, match=line):
        list(data.train_dataloader())


def test_no_image_at_all_is_named(tmp_path):
    tree(tmp_path)
    (tmp_path / "cat" / "03.png").write_text("hello")
    with pytest.raises(UserError, match=r"cat/03.png: cannot read the image \(UnidentifiedImageError"):
        ready(tmp_path).train_dataloader()


def test_odd_images_are_named(tmp_path):
    tree(tmp_path)
    picture(0, mode="L").save(tmp_path / "dog" / "04.png")
    with pytest.raises(
        UserError, match=r"dog/04.png: found 1 channel \(L\), expected 3 \(RGB\); set data.convert=true"
    ):
        ready(tmp_path).train_dataloader()
    picture(0, size=(9, 7)).save(tmp_path / "dog" / "04.png")
    with pytest.raises(UserError, match=r"dog/04.png: found 9x7 pixels, expected 8x8; set data.image_size"):
        ready(tmp_path).train_dataloader()


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"data.data_dir: no folder at .*/nowhere; expected the data of 'mine' there"):
        ready(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no folder for 'mine' \(looked for \$PENSTOCK_DATA/mine\); set data.data_dir"):
        ready()
    with pytest.raises(UserError, match=r"no images; expected files"):
        ready(tmp_path)
    tree(tmp_path)
    (tmp_path / "eel").mkdir()
    with pytest.raises(UserError, match=r"/eel: class folder without images"):
        ready(tmp_path)


def test_splits_with_other_classes_are_refused(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "test", classes=("cat", "cow"))
    with pytest.raises(UserError, match=r"test: its classes differ from those of train/ in cow, dog"):
        ready(tmp_path)


def test_unknown_hub_set_says_what_to_do(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(UserError, match=r"cannot get 'owner/set' from the .* \(ConnectionError: no route\).*/set$"):
        ready(name="owner/set")


def mnist(root, count=12):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for split in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
    return images, labels


def test_torchvision_class(tmp_path):
    images, labels = mnist(tmp_path)
    data = ready(tmp_path, name="torchvision:MNIST", channels=1)
    assert (data.shape, data.num_classes, len(data.view("all"))) == ((1, 28, 28), 10, 24)
    found = raw(data)
    assert np.array_equal(found["image"][:, 0].numpy(), images)
    assert found["label"].tolist() == labels.tolist()


def test_torchvision_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"torchvision.datasets has no class 'MNST' \(did you mean 'MNIST'\?\)"):
        ready(tmp_path, name="torchvision:MNST")
    with pytest.raises(UserError, match=r"'torchvision:MNIST' needs a folder; set data.data_dir"):
        ready(name="torchvision:MNIST")
    with pytest.raises(UserError, match=r"torchvision:MNIST is not in .* and cannot be downloaded"):
        Images("torchvision:MNIST", data_dir=str(tmp_path)).setup()


def test_bad_settings_name_the_key():
    with pytest.raises(UserError, match=r"data.channels: found 2, expected 1 or 3"):
        Images(channels=2)
    with pytest.raises(UserError, match=r"data.limit: found 0, expected at least 1"):
        Images(limit=0)
