"""FastFlow from the command line on VisA's and BTAD's layouts, and on a test set without anomalies."""

import json
import math
import shutil

import pytest
from anomaly_trees import btad, mvtec, visa

from penstock.lightning_modules.cli import main

TINY = [
    "net=fastflow_mobilenetv2",
    "model.net.backbone.model=mobilenetv2_035",
    "model.net.backbone.weights=random",
    "model.net.backbone.layers=[2]",
    "model.net.flow_steps=1",
    "image_size=32",
    "data.batch_size=2",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "callbacks.gallery.rows=3",
    "logger=csv",
]
NAMES = {"image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"}


@pytest.fixture(autouse=True)
def no_run_dir(monkeypatch):
    monkeypatch.delenv("RUN_DIR", raising=False)


@pytest.mark.parametrize(
    ("experiment", "make", "category"), [("fastflow_visa", visa, "nut"), ("fastflow_btad", btad, "01")]
)
def test_layouts(tmp_path, experiment, make, category):
    folder = make(tmp_path / "data")
    words = [f"experiment={experiment}", f"data.data_dir={folder}", f"data.category='{category}'"]
    assert main(["fit", *words, *TINY, f"run_dir={tmp_path / 'run'}"]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found.keys() >= NAMES
    assert (tmp_path / "run" / "samples" / "test.png").is_file()


def test_a_test_set_without_anomalies_has_no_metrics_and_says_so(tmp_path, recwarn):
    shutil.rmtree(mvtec(tmp_path / "data", defects=(("dent", 2),)) / "bolt" / "test" / "dent")
    words = ["experiment=fastflow_mvtec_resnet18", f"data.data_dir={tmp_path / 'data'}", "data.category=bolt"]
    assert main(["fit", *words, *TINY, f"run_dir={tmp_path / 'run'}"]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert not {name.rpartition("/")[2] for name in found} & NAMES
    assert "test/loss" in found
    assert not any(math.isnan(value) for value in found.values())
    said = [str(w.message) for w in recwarn.list if "undefined" in str(w.message)]
    assert any(line.startswith("AnomalyMetrics: all images of the test split are normal; image_auroc") for line in said)
    assert any(line.startswith("AnomalyMetrics: all pixels of the test split are normal; pixel_auroc") for line in said)
