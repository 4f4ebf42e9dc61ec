"""What `predict` leaves of a detector, as pycocotools takes it."""

import contextlib
import importlib
import io
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest

from penstock.lightning_modules.callbacks.detection_metrics import DetectionMetrics
from penstock.lightning_modules.callbacks.detection_predictions import DetectionPredictions
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


def test_entries_of_voc(tmp_path):
    data = ready(voc(tmp_path))
    numbers = [*data.view("val").numbers.tolist(), *data.view("test").numbers.tolist()]
    assert [data.entry(number) for number in numbers] == [
        *((k + 1, f"2007_{100 + k:06d}.jpg") for k in range(3)),
        *((k + 1, f"2007_{200 + k:06d}.jpg") for k in range(2)),
    ]
