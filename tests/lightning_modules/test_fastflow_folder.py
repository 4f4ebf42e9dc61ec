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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUN_DIR", raising=False)
        assert penstock("fit", *TINY, f"run_dir={folder}") == 0
    return folder / "checkpoints" / "last.ckpt"


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


def test_a_model_without_masks_leaves_heat_maps_and_says_what_it_cannot(checkpoint, tmp_path, caplog):
    for i in range(3):
        save(picture(i, (40, 36)), tmp_path / "new" / f"{i}.png")
    out = tmp_path / "p"
    with caplog.at_level("INFO"):
        assert penstock("predict", f"ckpt_path={checkpoint}", f"images={tmp_path / 'new'}", f"run_dir={out}") == 0
    said = [line for line in caplog.messages if line.startswith("predictions: ")]
    assert said == [
        "predictions: no masks: the checkpoint has no pixel_threshold (model not validated on images with masks)"
    ]
    assert not (out / "predictions" / "masks").exists()
    model = model_from_checkpoint(checkpoint)
    low, high = model.calibration.map_range.tolist()
    image = np.array(Image.open(tmp_path / "new" / "1.png").resize((32, 32), Image.Resampling.BILINEAR))
    image = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        maps = model(image)[1]
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


def test_a_picture_smaller_than_a_tile_is_named(checkpoint, tmp_path, capsys):
    for name, side in (("a", 31), ("b", 32), ("c", 50)):
        save(picture(0, (side, 60)), tmp_path / "new" / f"{name}.png")
    words = [f"ckpt_path={checkpoint}", f"images={tmp_path / 'new'}", "model.tile=32"]
    assert penstock("predict", *words, f"run_dir={tmp_path / 'p'}") == 2
    expected = "a.png: found 60x31 pixels, expected at least 32x32 (model.tile); all others were predicted"
    assert capsys.readouterr().err.splitlines()[-1].endswith(expected)
    assert list(scores(tmp_path / "p")) == ["b.png", "c.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "mended"),
    [("data.batch_size=4", {}), ("model.tile=32", {7: (40, 36), 8: (70, 33)})],
    ids=["fours", "tiles"],
)
def test_two_ranks_score_what_one_does(checkpoint, pictures, tmp_path, word, mended):
    """In fours, the second rank can read nothing of its last batch; in tiles, the ranks cannot share them evenly."""
    for i, size in mended.items():
        save(picture(i, size), pictures / f"{i}.png")
    good, bad = ([i for i in range(9) if (i in (1, 6, 7, 8) and i not in mended) is found] for found in (False, True))
    words = ["predict", f"ckpt_path={checkpoint}", f"images={pictures}", word, "trainer.accelerator=cpu"]
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
