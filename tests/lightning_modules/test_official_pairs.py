"""Folders of pairs of the official repositories, written here as they write them, read and refused."""

import csv
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.datamodules.digits import Digits
from penstock.datamodules.noise_store import state_bytes
from penstock.datamodules.pairs import Pairs
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError

SHAPE = (1, 8, 8)


def arrays(folder, seed, n=7, shape=SHAPE):
    """Rectified flow: one seed."""
    rng = np.random.default_rng(seed)
    z0, z1 = rng.standard_normal((2, n, *shape)).astype(np.float32)
    (folder / str(seed)).mkdir(parents=True)
    np.save(folder / str(seed) / "z0.npy", z0)
    np.save(folder / str(seed) / "z1.npy", z1)
    return z0, z1


def segments(folder, seed, times, n=5):
    """BOSS: one seed; states `(n, K + 1, ...)` of its trajectories."""
    states = np.random.default_rng(seed).standard_normal((len(times), n, *SHAPE)).astype(np.float32)
    own = folder / str(seed)
    own.mkdir(parents=True)
    ends = np.repeat(np.array(times, np.float32), n).reshape(len(times), n)
    for name, value in {"z0": states[:-1], "z1": states[1:], "t0": ends[:-1], "t1": ends[1:]}.items():
        np.save(own / f"{name}.npy", np.concatenate(value))
    return states.swapaxes(0, 1)


def pictures(folder, n=6, shape=(8, 8), zipped=True, classes=False):
    """2-rectified flow++: images (uint8), noise."""
    folder.mkdir()
    rng, noise = np.random.default_rng(0), np.random.default_rng(1)
    images, sources, files = rng.integers(256, size=(n, *shape), dtype=np.uint8), [], {}
    for i in range(n):
        picture = io.BytesIO()
        Image.fromarray(images[i]).save(picture, "PNG")
        files |= {f"samples/0/{i:05d}.png": picture.getvalue(), f"zs/0/{i:05d}.bin": state_bytes(noise)}
        sources.append(noise.standard_normal((1, *shape)).astype(np.float32))
    for path, content in files.items():
        kind, _, name = path.partition("/")
        if zipped:
            with zipfile.ZipFile(folder / f"{kind.removesuffix('s') if kind == 'zs' else kind}.zip", "a") as archive:
                archive.writestr(name, content)
        else:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    if classes:
        with (folder / "images_labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([f"0/{i:05d}.png", i % 3] for i in range(n))
    return images, np.stack(sources)


def taken(source, out, **options):
    """Taken over by the command line, then read by the DataModule."""
    assert main(["pairs", f"from={source}", f"out={out}", "shard=4"]) == 0
    data = Pairs(Digits(), folder=str(out), batch_size=4, **options)
    data.setup()
    return data, data.store.fetch(np.arange(data.recipe.n))


def refused(source, tmp_path, capsys):
    assert main(["pairs", f"from={source}", f"out={tmp_path / 'out'}"]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_arrays_of_rectified_flow(tmp_path):
    parts = [arrays(tmp_path / "in", seed, n) for seed, n in ((0, 7), (1, 3))]
    data, batch = taken(tmp_path / "in", tmp_path / "out")
    z0, z1 = (torch.from_numpy(np.concatenate(side)) for side in zip(*parts))
    assert torch.equal(batch["source"], z0)
    assert torch.equal(batch["image"], z1)
    assert sorted(p.name for p in (tmp_path / "out").glob("shard*"))[-1] == "shard_000002.safetensors"
    assert data.times is None
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "shard_000001.safetensors").unlink()
    _, again = taken(tmp_path / "in", tmp_path / "out")
    assert torch.equal(again["image"], z1)
    assert sum(p.stat().st_mtime_ns != stamp for p, stamp in stamps.items()) == 1


@pytest.mark.parametrize("times", [[0, 0.13, 0.52, 0.58, 1], [0, 1]])
def test_segments_of_boss(tmp_path, times):
    states = np.concatenate([segments(tmp_path / "4", seed, times) for seed in (0, 1)])
    data, batch = taken(tmp_path / "4", tmp_path / "out")
    assert torch.equal(batch["source"], torch.from_numpy(states[:, 0].copy()))
    assert torch.equal(batch["image"], torch.from_numpy(states[:, -1].copy()))
    if len(times) > 2:
        assert torch.equal(batch["states"], torch.from_numpy(states.copy()))
        assert data.times == pytest.approx(times)
        assert json.loads((tmp_path / "out" / "pairs.json").read_text())["keep"] == [0, 13, 52, 58, 100]


@pytest.mark.parametrize(("zipped", "classes"), [(True, True), (False, False)])
def test_pictures_of_the_improved_flow(tmp_path, zipped, classes):
    images, sources = pictures(tmp_path / "in", zipped=zipped, classes=classes)
    _, batch = taken(tmp_path / "in", tmp_path / "out")
    assert torch.equal(batch["source"], torch.from_numpy(sources))
    torch.testing.assert_close(batch["image"][:, 0], torch.from_numpy(images).float() / 255 * 2 - 1)
    if classes:
        assert batch["label"].tolist() == [0, 1, 2, 0, 1, 2]
    assert ("label" in batch) == classes


def test_boss_trains_on_them(teacher, tmp_path, monkeypatch):
    segments(tmp_path / "4", 0, [0, 0.25, 0.5, 0.75, 1], n=20)
    assert main(["pairs", f"from={tmp_path / '4'}", f"out={tmp_path / 'p'}"]) == 0
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    words = [
        f"data.folder={tmp_path / 'p'}",
        "data.teacher=null",
        "data.n=null",
        "data.val_fraction=0.2",
        "num_classes=0",
    ]
    words += ["data.batch_size=8", "trainer.max_epochs=1", "model.net.width=8", "model.net.blocks=1", "logger=csv"]
    words += ["model.initial=null", "callbacks.metrics=null", "callbacks.samples=null", "trainer.accelerator=cpu"]
    assert main(["fit", "experiment=boss_digits", f"teacher={teacher}", *words]) == 0
    assert "test/loss_interval_3" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_arrays_that_do_not_fit(tmp_path, capsys):
    arrays(tmp_path / "a", 0)
    np.save(tmp_path / "a" / "0" / "z1.npy", np.zeros((6, *SHAPE), np.float32))
    assert "z0.npy is (7, 1, 8, 8), z1.npy (6, 1, 8, 8), expected the same" in refused(tmp_path / "a", tmp_path, capsys)
    (tmp_path / "a" / "0" / "z1.npy").write_bytes(b"none")
    assert "z1.npy': can't be read as an array" in refused(tmp_path / "a", tmp_path, capsys)
    (tmp_path / "a" / "0" / "z1.npy").unlink()
    assert "z1.npy is missing; expected z0.npy and z1.npy" in refused(tmp_path / "a", tmp_path, capsys)
    arrays(tmp_path / "b", 0)
    arrays(tmp_path / "b", 1, shape=(3, 8, 8))
    assert "samples (3, 8, 8)" in refused(tmp_path / "b", tmp_path, capsys)
    segments(tmp_path / "c", 0, [0, 0.5, 1])
    np.save(tmp_path / "c" / "0" / "t0.npy", np.zeros(4, np.float32))
    assert "t0.npy is (4,), t1.npy (10,), expected (10,)" in refused(tmp_path / "c", tmp_path, capsys)
    segments(tmp_path / "d", 0, [0, 0.5, 1])
    np.save(tmp_path / "d" / "0" / "z1.npy", np.zeros((10, *SHAPE), np.float32))
    assert "does not go on as z0.npy" in refused(tmp_path / "d", tmp_path, capsys)
    segments(tmp_path / "e", 0, [0, 0.5, 0.9])
    assert "expected segments of as many rows each that follow one another from 0 to 1" in refused(
        tmp_path / "e", tmp_path, capsys
    )
    segments(tmp_path / "f", 0, [0, 2**-0.5, 1])
    assert "expected multiples of 1/K_max" in refused(tmp_path / "f", tmp_path, capsys)
    for name, value in {"z1": np.full((10, *SHAPE), "a"), "t0": np.full(10, "b"), "t1": np.full(10, np.nan)}.items():
        segments(tmp_path / name, 0, [0, 0.5, 1])
        np.save(tmp_path / name / "0" / f"{name}.npy", value)
        expected = f"{name}.npy': " + ("NaN or infinite in row 0" if name == "t1" else "found <U1, expected an array")
        assert expected in refused(tmp_path / name, tmp_path, capsys)
    z0, _ = arrays(tmp_path / "inf", 0)
    z0[3, 0, 2, 1] = np.inf
    np.save(tmp_path / "inf" / "0" / "z0.npy", z0)
    assert "z0.npy': NaN or infinite in row 3" in refused(tmp_path / "inf", tmp_path, capsys)
    (tmp_path / "g").mkdir()
    assert "no <seed>/z0.npy and no z.zip there" in refused(tmp_path / "g", tmp_path, capsys)
    assert "no such folder" in refused(tmp_path / "none", tmp_path, capsys)


def test_pictures_that_do_not_fit(tmp_path, capsys):
    def broken(name, path, content=None, **options):
        pictures(tmp_path / name, zipped=False, **options)
        (tmp_path / name / path).unlink()
        if content is not None:
            (tmp_path / name / path).write_bytes(content)
        return tmp_path / name

    folder = broken("a", "samples/0/00003.png")
    expected = "5 images and 6 noises, expected one noise an image; '0/00003' has no image"
    assert expected in refused(folder, tmp_path, capsys)
    folder = broken("b", "zs/0/00002.bin", b"short")
    assert main(["pairs", f"from={folder}", f"out={tmp_path / 'b_out'}"]) == 2
    assert "00002.bin': found 5 bytes, expected 32" in capsys.readouterr().err
    folder = broken("c", "samples/0/00001.png", b"none")
    assert main(["pairs", f"from={folder}", f"out={tmp_path / 'c_out'}"]) == 2
    assert "'0/00001.png' is no image" in capsys.readouterr().err
    other = io.BytesIO()
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(other, "PNG")
    folder = broken("d", "samples/0/00004.png", other.getvalue())
    assert main(["pairs", f"from={folder}", f"out={tmp_path / 'd_out'}"]) == 2
    assert "'0/00004.png' is (1, 9, 8), expected (1, 8, 8) as the first" in capsys.readouterr().err
    folder = broken("e", "images_labels.csv", b"0/00000.png,1\n", classes=True)
    assert main(["pairs", f"from={folder}", f"out={tmp_path / 'e_out'}"]) == 2
    assert "no label of '0/00001.png'" in capsys.readouterr().err
    assert not [path for path in tmp_path.glob("*_out*") if path.is_dir()]


def test_words_and_another_folder(tmp_path, capsys):
    arrays(tmp_path / "a", 0)
    arrays(tmp_path / "b", 0, n=8, shape=(3, 8, 8))
    assert main(["pairs", f"from={tmp_path / 'a'}"]) == 2
    assert "out=FOLDER is required" in capsys.readouterr().err
    assert main(["pairs", f"from={tmp_path / 'a'}", f"ou={tmp_path / 'out'}"]) == 2
    assert "pairs ou: unknown (did you mean 'out'?)" in capsys.readouterr().err
    assert main(["pairs", f"from={tmp_path / 'b'}", f"out={tmp_path / 'out'}"]) == 0
    assert main(["pairs", f"from={tmp_path / 'a'}", f"out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "made of other files" in error
    assert f"expected those of '{tmp_path / 'a'}'; give another folder" in error
    assert main(["pairs", f"from={tmp_path / 'a'}", "ckpt_path=last.ckpt"]) == 2
    assert "from and ckpt_path exclude each other" in capsys.readouterr().err
    assert main(["pairs", f"from={tmp_path / 'a'}", "shard=0", f"out={tmp_path / 'none'}"]) == 2
    assert "shard=0, expected 1 or more" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.lock"))
    with pytest.raises(UserError, match=r"samples \[3, 8, 8\], expected \[1, 8, 8\], data.real's"):
        Pairs(Digits(), folder=str(tmp_path / "out")).setup()
