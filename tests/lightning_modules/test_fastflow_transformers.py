"""FastFlow on vision transformers by the command line: images of another size than the model's own."""

import json

import pytest

from penstock.lightning_modules.cli import main
from tests.anomaly_trees import mvtec
from tests.lightning_modules.test_fastflow import TINY

WORDS = [*TINY, "model.net.backbone.model=vit_tiny_patch16_224", "model.net.backbone.layers=[1]"]


@pytest.mark.parametrize("norm", ["channel", "sample", "null"])  # the size is seen as the fit starts, at once, in it
def test_another_size_is_refused_in_a_line_that_says_the_key(norm, tmp_path, capsys):
    tree = mvtec(tmp_path / "tree", size=(70, 66))
    words = [*WORDS, f"model.net.norm={norm}", f"data.data_dir={tree}", f"run_dir={tmp_path / 'run'}"]
    assert main(["fit", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "model.net.backbone.image_size: timm's vit_tiny_patch16_224 is made for images of 224x224" in line
    assert line.endswith("found images of 64x64; expected model.net.backbone.image_size=64")


def test_the_key_makes_it_fit(tmp_path):
    tree = mvtec(tmp_path / "tree", size=(70, 66))
    words = [*WORDS, "model.net.backbone.image_size=64", f"data.data_dir={tree}", f"run_dir={tmp_path / 'run'}"]
    assert main(["fit", *words, "trainer.max_epochs=1"]) == 0
    assert "image_auroc" in json.loads((tmp_path / "run" / "metrics.json").read_text())
