"""SEPC end to end on small scenes of digits, with every host and neck."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.datamodules.detection_transforms import Resizing
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import main

TINY = [
    "experiment=sepc_bccd",
    "data=digit_scenes",
    "net=detector_mobilenetv2_tf",
    "image_size=96",
    "model.net.channels=16",
    "model.net.backbone.model=mobilenetv2_035",
    "model.net.backbone.weights=random",
    "data.batch_size=2",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=2",
    "logger=csv",
]


@pytest.fixture(autouse=True)
def no_run_dir(monkeypatch):
    monkeypatch.delenv("RUN_DIR", raising=False)


PAIRS = {
    "retina": "towers",
    "free_anchor": "pconv",
    "fsaf": "pconv_ibn",
    "fcos": "sepc_lite",
    "atss": "sepc",
}


@pytest.mark.parametrize("host", PAIRS)
def test_fit_and_test(host, tmp_path):
    run = tmp_path / "run"
    assert main(["fit", *TINY, f"host={host}", f"neck={PAIRS[host]}", f"run_dir={run}"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["ap"] <= metrics["ap50"] <= 1
    assert all(value == value for value in metrics.values())
    rows = json.loads((run / "detections" / "test.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == set(rows[0]) if rows else True
    model = model_from_checkpoint(run / "checkpoints" / "last.ckpt")
    batch = {
        "image": torch.rand(2, 3, 96, 96) * 2 - 1,
        "index": torch.arange(2),
        "size": torch.tensor([[96, 96], [64, 80]]),
        "original_size": torch.tensor([[192, 96], [64, 80]]),
    }
    with torch.no_grad():
        found = model.eval().predict_step(batch, 0)
    for boxes, limit in zip(found["boxes"], ((96, 192), (80, 64))):
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([*limit, *limit])).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUN_DIR", raising=False)
        folder = tmp_path_factory.mktemp("run") / "a"
        assert main(["fit", *TINY, "host=fcos", f"run_dir={folder}"]) == 0
    return folder


def test_predictions_of_a_folder(run, tmp_path):
    """Pictures come out as the data for detectors would see them, boxes in their own pixels."""
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (70, 90)), ("in/b.jpg", (200, 120))):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "new" / name)
    checkpoint = run / "checkpoints" / "last.ckpt"
    words = [f"ckpt_path={checkpoint}", f"images={tmp_path / 'new'}", f"run_dir={tmp_path / 'p'}"]
    assert main(["predict", *words, "model.min_size=96", "model.max_size=128"]) == 0
    found = json.loads((tmp_path / "p" / "predictions" / "boxes.json").read_text())
    assert [row["file_name"] for row in found["images"]] == ["a.png", "in/b.jpg"]
    assert [(row["height"], row["width"]) for row in found["images"]] == [(70, 90), (200, 120)]
    assert [row["name"] for row in found["categories"]] == [str(digit) for digit in range(10)]
    sizes = {row["id"]: (row["width"], row["height"]) for row in found["images"]}
    for row in found["annotations"]:
        (x, y, width, height), (right, bottom) = row["bbox"], sizes[row["image_id"]]
        assert -1e-3 <= x <= x + width <= right + 1e-2
        assert -1e-3 <= y <= y + height <= bottom + 1e-2
    for name, size in (("a.png", (90, 70)), ("in/b.jpg.png", (120, 200))):
        assert Image.open(tmp_path / "p" / "predictions" / "boxes" / name).size == size
    model = model_from_checkpoint(checkpoint)
    model.resizing = Resizing((96,), 128)
    batch = model._resized({"image": torch.rand(1, 3, 200, 120) * 2 - 1, "index": torch.arange(1)})
    assert batch["image"].shape == (1, 3, 128, 96)
    assert batch["size"].tolist() == [[128, 77]]
    assert batch["original_size"].tolist() == [[200, 120]]
    given = {"image": torch.rand(1, 3, 96, 96), "index": torch.arange(1), "original_size": torch.tensor([[300, 60]])}
    assert model._resized(given)["original_size"].tolist() == [[300, 60]]


def test_two_stages(tmp_path):
    run = tmp_path / "run"
    words = [word for word in TINY if not word.startswith(("net=", "experiment="))]
    assert main(["fit", "experiment=sepc_bccd_two_stage", *words, "model.net.hidden=32", f"run_dir={run}"]) == 0
    assert {"ap", "ap50"} <= json.loads((run / "metrics.json").read_text()).keys()


def test_classes_of_other_data(tmp_path, capsys):
    assert main(["fit", *TINY, "num_classes=4", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "num_classes: found 4, expected 10, the data's classes" in capsys.readouterr().err
