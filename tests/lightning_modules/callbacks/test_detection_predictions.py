"""What `predict` leaves of a detector, as pycocotools takes it."""

import contextlib
import importlib
import io
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torchvision.io import read_image

from penstock.datamodules.digit_scenes import DigitScenes
from penstock.lightning_modules.callbacks.detection_metrics import DetectionMetrics
from penstock.lightning_modules.callbacks.detection_predictions import DetectionPredictions
from penstock.lightning_modules.instance_masks import decoded, written
from tests.box_trees import coco, edit, ready, voc


@pytest.fixture
def made(fakes, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(importlib.sys.modules, "fakes", fakes)
    return importlib.import_module("detection_model")


def test_predictions_of_own_images_are_for_their_annotations(made, tmp_path):
    """pycocotools, given the set's file and ours, measures what `test` logs."""
    tree = coco(tmp_path / "tree", (("train", 8), ("val", 3), ("test", 7)))
    for split in ("val", "test"):
        content, write_back = edit(tree, split)
        content["images"].reverse()  # neither ids nor names ascend with our numbers
        write_back()

    class Predicting(made.Mover):
        classes = (("cat", 2), ("dog", 7), ("toothbrush", 90))

        def predict_step(self, batch, batch_idx):
            return self.validation_step(batch, batch_idx)

    module, data = Predicting(), ready(tree, eval_batch_size=3)
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[DetectionMetrics(), DetectionPredictions(pictures=False)],
        logger=False,
        enable_progress_bar=False,
    )
    (values,) = trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data)
    found = json.loads((tmp_path / "predictions" / "boxes.json").read_text())
    truth = json.loads((tree / "annotations" / "instances_test.json").read_text())
    assert found["images"] == truth["images"]
    assert {row["image_id"] for row in found["annotations"]} <= {row["id"] for row in truth["images"]}
    api, evaluation = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    with contextlib.redirect_stdout(io.StringIO()):
        own = api.COCO(str(tree / "annotations" / "instances_test.json"))
        result = evaluation.COCOeval(own, own.loadRes(str(tmp_path / "predictions" / "results.json")), "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    assert 0.1 < values["ap"] < 0.99
    assert [values["ap"], values["ap50"], values["ap75"]] == pytest.approx(result.stats[:3].tolist(), abs=1e-6)


def test_masks_are_written_and_drawn(tmp_path):
    """A module that finds what is marked: its files hold the masks, its pictures their ink."""
    data = DigitScenes(scenes=16, eval_batch_size=2, masks=True)

    class Marked(pl.LightningModule):
        classes = tuple((str(k), k) for k in range(10))

        def predict_step(self, batch, batch_idx):
            targets = self.trainer.datamodule.targets(batch["index"])
            found = {name: [one[name] for one in targets] for name in ("boxes", "labels", "masks")}
            return {"index": batch["index"], **found, "scores": [torch.ones(len(one["boxes"])) for one in targets]}

    folders = [tmp_path / name for name in ("masks", "boxes")]
    for folder in folders:
        quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": folder}
        module = Marked()
        if folder.name == "boxes":
            module.predict_step = lambda *args, step=module.predict_step: {
                k: v for k, v in step(*args).items() if k != "masks"
            }
        pl.Trainer(callbacks=[DetectionPredictions()], **quiet).predict(module, datamodule=data)
    results = json.loads((folders[0] / "predictions" / "results.json").read_text())
    annotations = json.loads((folders[0] / "predictions" / "boxes.json").read_text())["annotations"]
    targets = [target for target in data.targets(data.view("test").numbers) if len(target["boxes"])]
    expected = [written(mask) for target in targets for mask in target["masks"]]
    assert [row["segmentation"] for row in results] == [row["segmentation"] for row in annotations] == expected
    assert "segmentation" not in (folders[1] / "predictions" / "boxes.json").read_text()
    pictures = [sorted((folder / "predictions" / "boxes").rglob("*.png")) for folder in folders]
    differing = [read_image(str(a)) != read_image(str(b)) for a, b in zip(*pictures)]
    inked = [
        target["masks"] and decoded(target["masks"], (128, 128)).amax(0).bool()
        for target in data.targets(data.view("test").numbers)
    ]
    for differs, ink in zip(differing, inked):
        assert not differs.any(0)[~ink].any() if len(ink) else not differs.any()
    assert any(differs.any() for differs in differing)


def test_entries_of_voc(tmp_path):
    data = ready(voc(tmp_path))
    numbers = [*data.view("val").numbers.tolist(), *data.view("test").numbers.tolist()]
    assert [data.entry(number) for number in numbers] == [
        *((k + 1, f"2007_{100 + k:06d}.jpg") for k in range(3)),
        *((k + 1, f"2007_{200 + k:06d}.jpg") for k in range(2)),
    ]
