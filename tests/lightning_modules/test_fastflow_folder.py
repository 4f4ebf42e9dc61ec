"""Predictions of FastFlow on folders: models without masks, pictures that cannot be read, two ranks."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from anomaly_trees import picture, save
from PIL import Image
from ranks import running
from torch.nn.functional import interpolate

from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.callbacks.anomaly_pictures import heat
from penstock.lightning_modules.cli import main

TINY = [
    "experiment=fastflow_digits",
    "image_size=32",
    "model.net.backbone.model=mobilenetv2_035",
    "model.net.flow_steps=1",
    "model.net.backbone.layers=[2]",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "callbacks.gallery.rows=3",
    "logger=csv",
]


def penstock(*words):
    code = main([*words])
    os.environ.pop("RUN_DIR", None)  # that it left
    return code


def fitted(folder, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUN_DIR", raising=False)
        assert penstock("fit", *TINY, *words, f"run_dir={folder}") == 0
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("run") / "a")


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("tiled") / "a", "model.tile=32")


@pytest.fixture
def pictures(tmp_path):
    """Nine pictures, the second and the last three cut short."""
    folder = tmp_path / "pictures"
    for i in range(9):
        save(picture(i, (40, 36)), folder / f"{i}.png")
    for i in (1, 6, 7, 8):
        file = folder / f"{i}.png"
        file.write_bytes(file.read_bytes()[:200])
    return folder


def scores(folder):
    found = json.loads((folder / "predictions" / "scores.json").read_text())["images"]
    with (folder / "predictions" / "scores.csv").open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [row["file"] for row in found]
    return {row["file"]: row["score"] for row in found}


def test_a_model_without_masks_leaves_heat_maps_and_says_what_it_cannot(checkpoint, tmp_path, monkeypatch):
    for i in range(3):
        save(picture(i, (40, 36)), tmp_path / "new" / f"{i}.png")
    out, said = tmp_path / "p", []
    monkeypatch.setattr("penstock.lightning_modules.callbacks.anomaly_predictions.rank_zero_info", said.append)
    assert penstock("predict", f"ckpt_path={checkpoint}", f"images={tmp_path / 'new'}", f"run_dir={out}") == 0
    assert said == [
        "predictions: no masks: the checkpoint has no pixel_threshold (model not validated on images with masks)"
    ]
    assert not (out / "predictions" / "masks").exists()
    model = model_from_checkpoint(checkpoint)
    low, high = model.calibration.map_range.tolist()
    picture_itself = Image.open(tmp_path / "new" / "1.png")
    small, image = (
        torch.from_numpy(np.array(one)).permute(2, 0, 1)[None] / 127.5 - 1
        for one in (picture_itself.resize((32, 32), Image.Resampling.BILINEAR), picture_itself)
    )
    with torch.no_grad():
        maps = interpolate(model(small)[1], (36, 40), mode="bilinear")
    expected = heat(image, ((maps - low) / (high - low)).clamp(0, 1))[0].permute(1, 2, 0)
    found = np.array(Image.open(out / "predictions" / "heat" / "1.png"))
    assert np.abs(found.astype(int) - expected.numpy()).max() <= 1


def test_pictures_cut_short_are_named_and_all_others_scored(checkpoint, pictures, tmp_path, capsys):
    words = [f"ckpt_path={checkpoint}", f"images={pictures}", "data.batch_size=4"]
    assert penstock("predict", *words, f"run_dir={tmp_path / 'p'}") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"penstock: {pictures}/1.png: cannot read the image (")
    others = ", ".join(f"{pictures}/{i}.png" for i in (6, 7, 8))
    assert err.endswith(f"; nor can be read: {others}; all others were predicted")
    assert list(scores(tmp_path / "p")) == [f"{i}.png" for i in (0, 2, 3, 4, 5)]
    assert len(list((tmp_path / "p" / "predictions" / "heat").iterdir())) == 5
    assert penstock("predict", *words, "data.num_workers=1", f"run_dir={tmp_path / 'q'}") == 2
    assert scores(tmp_path / "q") == scores(tmp_path / "p")


def test_a_picture_smaller_than_a_tile_is_named(tiled, tmp_path, capsys):
    for name, side in (("a", 31), ("b", 32), ("c", 50)):
        save(picture(0, (side, 60)), tmp_path / "new" / f"{name}.png")
    words = [f"ckpt_path={tiled}", f"images={tmp_path / 'new'}"]
    assert penstock("predict", *words, f"run_dir={tmp_path / 'p'}") == 2
    expected = "a.png: found 60x31 pixels, expected at least 32x32 (model.tile); all others were predicted"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)
    assert list(scores(tmp_path / "p")) == ["b.png", "c.png"]


def test_a_second_prediction_leaves_nothing_of_the_first(checkpoint, tmp_path, capsys):
    for name in ("a.png", "a.jpg", "a.jpg.png"):
        save(picture(0, (40, 36)), tmp_path / "new" / name)
    words = [f"ckpt_path={checkpoint}", f"run_dir={tmp_path / 'p'}"]
    heats = tmp_path / "p" / "predictions" / "heat"
    assert penstock("predict", *words, f"images={tmp_path / 'new'}") == 0
    assert sorted(path.name for path in heats.iterdir()) == ["a.jpg.png", "a.jpg.png.png", "a.png"]
    save(Image.new("I;16", (40, 36)), tmp_path / "deep.png")
    assert penstock("predict", *words, f"images={tmp_path / 'deep.png'}") == 2
    line = f"penstock: {tmp_path}/deep.png: found I;16 pixels, expected 8 bits a channel"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert len(scores(tmp_path / "p")) == 3  # nothing could be predicted, nothing is lost
    assert penstock("predict", *words, f"images={tmp_path / 'new' / 'a.jpg'}") == 0
    assert list(scores(tmp_path / "p")) == ["a.jpg"]
    assert [path.name for path in heats.iterdir()] == ["a.jpg.png"]


def test_deep_pictures_are_named_and_all_others_scored(checkpoint, tmp_path, capsys):
    save(picture(0, (40, 36)), tmp_path / "new" / "a.png")
    save(Image.new("I;16", (40, 36)), tmp_path / "new" / "b.png")
    assert penstock("predict", f"ckpt_path={checkpoint}", f"images={tmp_path / 'new'}", f"run_dir={tmp_path}/p") == 2
    expected = "b.png: found I;16 pixels, expected 8 bits a channel; all others were predicted"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)
    assert list(scores(tmp_path / "p")) == ["a.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mended"), [("checkpoint", {}), ("tiled", {7: (40, 36), 8: (70, 33)})], ids=["fours", "tiles"]
)
def test_two_ranks_score_what_one_does(request, pictures, tmp_path, kind, mended):
    """In fours, the second rank can read nothing of its last batch; in tiles, the ranks cannot share them evenly."""
    for i, size in mended.items():
        save(picture(i, size), pictures / f"{i}.png")
    good, bad = ([i for i in range(9) if (i in (1, 6, 7, 8) and i not in mended) is found] for found in (False, True))
    words = ["predict", f"ckpt_path={request.getfixturevalue(kind)}", f"images={pictures}", "trainer.accelerator=cpu"]
    words += ["data.batch_size=4"]
    assert penstock(*words, f"run_dir={tmp_path / 'one'}") == 2
    ranks = [*words, "trainer.devices=2", "trainer.strategy=ddp", f"run_dir={tmp_path / 'two'}"]
    with running(__file__, tmp_path, *ranks):
        pass
    found, expected = scores(tmp_path / "two"), scores(tmp_path / "one")
    assert list(found) == list(expected) == [f"{i}.png" for i in good]
    assert found == pytest.approx(expected, rel=1e-5)
    ends = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [end["code"] for end in ends] == [2, 2]
    assert f"{pictures}/1.png: cannot read the image" in ends[0]["err"]
    others = ", ".join(f"{pictures}/{i}.png" for i in bad[1:])
    assert f"; nor can be read: {others}; all others were predicted" in ends[0]["err"]
    assert "penstock:" not in ends[1]["err"]
    for run in ("one", "two"):
        heats = sorted((tmp_path / run / "predictions" / "heat").iterdir())
        assert [path.name for path in heats] == [f"{i}.png" for i in good]


if __name__ == "__main__":
    import contextlib
    import io

    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(sys.argv[2:])
    report = {"code": code, "err": err.getvalue()}
    Path(sys.argv[1], f"rank{os.environ['RANK']}.json").write_text(json.dumps(report))
