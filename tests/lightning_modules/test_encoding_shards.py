"""`penstock encode` of tar shards: the latents of the same pictures and clips as files."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from autoencoders import Halved
from PIL import Image
from safetensors.torch import load_file
from tars import shard

from penstock.datamodules.latents import CachedLatents
from penstock.lightning_modules.cli import main

NAMES = [f"{n:02d}" for n in range(10)]
IMAGES = ["data=image_text", "image_size=8", "data.name=mine", "data.val_fraction=0.3"]
CLIPS = ["data=video", "image_size=16", "frames=2", "data.multiple=8", "data.val_fraction=0.3"]
CLIPS += ["data.aspects=[1:1,16:9]"]


def content(n, kind):
    """A picture of 8x8, or a clip of five frames, wide or square in turns."""
    draws = np.random.default_rng(n)
    size = (8, 8) if kind == "png" else ((16, 16), (18, 32))[n % 2]
    frames = [Image.fromarray(draws.integers(256, size=(*size, 3), dtype=np.uint8)) for _ in range(5)]
    more = {} if kind == "png" else {"save_all": True, "append_images": frames[1:], "duration": 100}
    frames[0].save(out := io.BytesIO(), kind, **more)
    return out.getvalue()


@pytest.fixture(params=["png", "gif"])
def sets(request, tmp_path, monkeypatch):
    """Words of the data, and folders of the same samples as files and in two shards."""
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(Halved=Halved))
    kind, files, tars = request.param, tmp_path / "files", tmp_path / "tars"
    files.mkdir()
    lines, members = [], []
    for n, name in enumerate(NAMES):
        (files / f"{name}.{kind}").write_bytes(content(n, kind))
        lines.append(json.dumps({"file": f"{name}.{kind}", "text": f"sample {n}"}))
        members += [(f"{name}.{kind}", content(n, kind)), (f"{name}.txt", f"sample {n}".encode())]
    (files / "captions.jsonl").write_text("\n".join(lines))
    shard(tars / "0000.tar", *members[:12])
    shard(tars / "0001.tar", *members[12:])
    return IMAGES if kind == "png" else CLIPS, files, tars


def encoded(words, folder, out):
    more = [f"data.data_dir={folder}", "model.autoencoder.class_path=own.Halved", "batch=2", "shard=4", f"out={out}"]
    assert main(["encode", *words, *more]) == 0
    return sorted(out.glob("shard_*.safetensors"))


def test_latents_are_those_of_the_same_files(sets, tmp_path):
    words, files, tars = sets
    expected, found = (encoded(words, folder, tmp_path / f"of_{folder.name}") for folder in (files, tars))
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected):
        ours, theirs = load_file(one), load_file(other)
        assert ours.keys() == theirs.keys() == {"mean", "std", "index", "split"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert one.with_suffix(".json").read_text() == other.with_suffix(".json").read_text()
    data = CachedLatents(str(tmp_path / "of_tars"), batch_size=2)
    data.setup()
    rows = data.store.fetch(np.arange(len(data.store.index))[data.store.bucket == 0])
    assert set(map(tuple, rows["text"])) <= {(f"sample {n}",) for n in range(10)}
    assert len(data.view("train")) + len(data.view("val")) == len(data.store.index)


def test_a_killed_run_goes_on(sets, tmp_path):
    words, _, tars = sets
    whole, out = encoded(words, tars, tmp_path / "whole"), tmp_path / "again"
    before = encoded(words, tars, out)
    before[1].unlink()
    kept = before[0].stat().st_mtime_ns
    after = encoded(words, tars, out)
    assert [path.read_bytes() for path in after] == [path.read_bytes() for path in whole]
    assert after[0].stat().st_mtime_ns == kept
