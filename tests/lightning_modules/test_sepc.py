"""SEPC end to end on small scenes of digits, with every host and neck."""

import itertools
import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.datamodules.detection_transforms import Resizing
from penstock.lightning_modules.build import build, config_of_checkpoint, model_from_checkpoint
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import Detector

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
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=2",
    "logger=csv",
]
SELECTION = "penstock.lightning_modules.detection.selection.Selection"
ALL = f"model.net.host.selection={{class_path: {SELECTION}, score: 0.0, most: 20}}"  # untrained heads are never sure


@pytest.fixture(autouse=True)
def no_run_dir(monkeypatch):
    monkeypatch.delenv("RUN_DIR", raising=False)


def check_losses(metrics: dict[str, float], split: str) -> None:
    """That there are several, and their sum."""
    parts = [value for name, value in metrics.items() if name.startswith(f"{split}/") and name.endswith("_loss")]
    assert len(parts) > 1
    assert metrics[f"{split}/loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert metrics[f"{split}/loss"] > 0


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
    assert main(["fit", *TINY, f"host={host}", f"neck={PAIRS[host]}", ALL, f"run_dir={run}"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["ap"] <= metrics["ap50"] <= 1
    check_losses(metrics, "train")
    check_losses(metrics, "val")
    assert all(value == value for value in metrics.values())
    rows = json.loads((run / "detections" / "test.json").read_text())
    assert len(rows) == 4 * 20
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
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
        assert len(boxes) == 20
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([*limit, *limit])).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUN_DIR", raising=False)
        folder = tmp_path_factory.mktemp("run") / "a"
        assert main(["fit", *TINY, "host=fcos", ALL, f"run_dir={folder}"]) == 0
    return folder


def test_export(run, tmp_path, capsys, monkeypatch):
    """The verb, but for the writing of the program, see `test_exporting_detector.py`."""
    written = []
    monkeypatch.setattr("penstock.lightning_modules.exporting.exported", lambda *given: written.append(given))
    words = ["export", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"out={tmp_path / 'out'}"]
    assert main([*words, "image_size=[96,8]"]) == 2
    assert "image_size=[96,8]: expected [height,width]" in capsys.readouterr().err
    assert main([*words, "format=ncnn"]) == 2
    assert "which ncnn has no operator for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "format=torch", "image_size=[64,96]"]) == 0
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert facts["inputs"] == {"image": [1, 3, 64, 96], "size": [1, 2], "original_size": [1, 2]}
    assert facts["classes"][3] == {"name": "3", "id": 3}
    module, example, _, kind, _, batch = written[0]
    assert ([*example], kind, batch) == ([*facts["inputs"]], "torch", 1)
    boxes, scores, labels, count = module(
        torch.rand(1, 3, 64, 96), torch.tensor([[64, 80]]), torch.tensor([[128, 160]])
    )
    assert (boxes.shape, scores.shape, labels.shape, count.tolist()) == ((1, 20, 4), (1, 20), (1, 20), [20])
    assert boxes.max() > 96


def test_predictions_of_a_folder(run, tmp_path):
    """Pictures are seen as the data showed them in training, boxes come in their own pixels."""
    generator, sizes = np.random.default_rng(0), {"a.png": (70, 90), "b.jpg": (200, 120), "b.jpg.png": (64, 64)}
    for name, size in sizes.items():
        (tmp_path / "new" / "in").mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "new" / "in" / name)
    checkpoint, out = run / "checkpoints" / "last.ckpt", tmp_path / "p" / "predictions"
    words = [f"ckpt_path={checkpoint}", f"run_dir={tmp_path / 'p'}"]
    assert main(["predict", *words, f"images={tmp_path / 'new'}"]) == 0
    found = json.loads((out / "boxes.json").read_text())
    assert [row["file_name"] for row in found["images"]] == [f"in/{name}" for name in sizes]
    assert [(row["height"], row["width"]) for row in found["images"]] == list(sizes.values())
    assert [row["name"] for row in found["categories"]] == [str(digit) for digit in range(10)]
    assert len(found["annotations"]) == 3 * 20
    for row in found["annotations"]:
        (x, y, width, height), (bottom, right) = row["bbox"], list(sizes.values())[row["image_id"]]
        assert -1e-3 <= x <= x + width <= right + 1e-2
        assert -1e-3 <= y <= y + height <= bottom + 1e-2
    for name, size in (("a.png", (90, 70)), ("b.jpg.png", (120, 200)), ("b.jpg.png.png", (64, 64))):
        assert Image.open(out / "boxes" / "in" / name).size == size
    os.environ.pop("RUN_DIR")
    assert main(["predict", *words, f"images={tmp_path / 'new' / 'in' / 'a.png'}"]) == 0
    assert [path.name for path in (out / "boxes").rglob("*.png")] == ["a.png"]


def test_what_the_data_said_is_in_the_checkpoint(run):
    seen = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert seen["trained_on"]["sides"] == ([96], 96)
    model = model_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert model.classes == [(str(digit), digit) for digit in range(10)]
    batch = model._resized({"image": torch.rand(1, 3, 200, 120) * 2 - 1, "index": torch.arange(1)})
    assert batch["image"].shape == (1, 3, 96, 64)
    assert batch["size"].tolist() == [[96, 58]]
    assert batch["original_size"].tolist() == [[200, 120]]
    given = {"image": torch.rand(1, 3, 96, 96), "index": torch.arange(1), "original_size": torch.tensor([[300, 60]])}
    assert model._resized(given)["original_size"].tolist() == [[300, 60]]


def test_two_stages(tmp_path):
    run = tmp_path / "run"
    words = [word for word in TINY if not word.startswith(("net=", "experiment="))]
    assert main(["fit", "experiment=sepc_bccd_two_stage", *words, "model.net.hidden=32", f"run_dir={run}"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"ap", "ap50", "train/loss"} <= metrics.keys()
    assert "val/loss" not in metrics


def test_classes_of_other_data(tmp_path, capsys):
    assert main(["fit", *TINY, "num_classes=4", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "num_classes: found 4, expected 10, the data's classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("neck", "images", "said"), [("sepc_lite", 1, 1), ("pconv_ibn", 2, 0), ("pconv", 1, 0), ("towers", 1, 0)]
)
def test_statistics_of_a_single_image_are_warned_of(neck, images, said, tmp_path):
    words = [word for word in TINY if not word.startswith(("data.batch_size", "trainer.limit"))]
    words += [f"neck={neck}", f"data.batch_size={images}", "trainer.fast_dev_run=1", f"run_dir={tmp_path / 'run'}"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["fit", *words]) == 0
    text = [str(one.message) for one in caught if "integrated batch norm" in str(one.message)]
    assert len(text) == said
    assert all("data.batch_size: found 1; integrated" in line for line in text)
    assert all("data.batch_size=4, or a neck without it" in line for line in text)


def test_losses_of_a_validation(tmp_path, monkeypatch):
    """Those of the same images and weights, by the pass that finds the boxes."""
    passes, forward = [], Detector.forward
    monkeypatch.setattr(Detector, "forward", lambda net, image: passes.append(net.training) or forward(net, image))
    words = [*TINY, "neck=pconv_ibn", "model.lr=0", "trainer.limit_val_batches=2", "trainer.num_sanity_val_steps=0"]
    assert main(["fit", *words, "trainer.limit_test_batches=0", f"run_dir={tmp_path / 'run'}"]) == 0
    assert passes == [True, True, False, False]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    model, (data,) = model_from_checkpoint(path), build(config_of_checkpoint(path), "data")
    data.setup()
    model.pad_multiple = data.pad_multiple
    batches = itertools.islice(data.reference_dataloader("val"), 2)
    with torch.no_grad():
        expected = [model.losses(batch) for batch in batches]
    for name in ("class", "box"):
        mean = sum(float(one[name]) for one in expected) / 2
        assert metrics[f"val/{name}_loss"] == pytest.approx(mean, rel=1e-4)
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/box_loss", "val/loss", "val/box_loss", "val/class_loss"} <= set(rows[0].split(","))


def test_no_losses_where_nothing_is_trained(run, tmp_path):
    words = [f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"run_dir={tmp_path / 'v'}"]
    assert main(["validate", *words]) == 0
    found = json.loads((tmp_path / "v" / "metrics.json").read_text())
    assert "val/ap" in found
    assert not any("loss" in name for name in found)


def test_predictions_that_nobody_could_name(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = [word for word in TINY if not word.startswith(("data", "image_size"))]
    words += ["data=pictures", f"data.data_dir={tmp_path}", "num_classes=3", f"run_dir={tmp_path / 'run'}"]
    assert main(["predict", *words]) == 2
    assert "model: its classes are not known; expected ckpt_path=FILE" in capsys.readouterr().err


def test_data_of_other_classes_are_refused(run):
    """A checkpoint says what it was trained on; data at hand keep their own sizes and ids, not their own order."""
    model = model_from_checkpoint(run / "checkpoints" / "last.ckpt")
    data = SimpleNamespace(class_names=["traffic_light", "cat"], category_ids=[10, 17], num_classes=2)
    data.resizing, data.pad_multiple = Resizing((64,), 64), 32
    seen = {"classes": [("traffic light", 1), ("cat", 2)], "sides": ([90], 120), "pad_multiple": 8}
    model.net.num_classes, model.trainer = 2, SimpleNamespace(datamodule=data)
    model.setup("test")
    model.on_load_checkpoint({"trained_on": seen})
    assert model.classes == [("traffic_light", 10), ("cat", 17)]
    assert (model.resizing, model.pad_multiple) == (Resizing((64,), 64), 32)
    data.class_names.reverse()
    model.setup("test")
    with pytest.raises(UserError, match=r"data\.classes: found 'cat' as class 0, expected 'traffic light'"):
        model.on_load_checkpoint({"trained_on": seen})
    model = model_from_checkpoint(run / "checkpoints" / "last.ckpt")
    model.on_load_checkpoint({"trained_on": seen})
    assert (model.classes, model.pad_multiple) == ([("traffic light", 1), ("cat", 2)], 8)
    assert model.resizing.sides == (90,)
