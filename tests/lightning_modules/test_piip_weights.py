"""PIIP's released weights from words: classifiers, detectors, segmenters, our own checkpoints, and wrong files."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.lightning_modules.build import build
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.compose import compose
from tests.piip_files import MASK_RCNN, official

QUIET = ["logger=csv", "callbacks.cost=null", "trainer.enable_model_summary=false"]
CLASSIFIER = ["experiment=piip_digits", "data.pictures=32", "data.batch_size=16", "model.net.depth=1", *QUIET]
SEGMENTER = ["experiment=piip_ade20k", "data=digit_masks", "data.scenes=32", "image_size=64", "perf=default", *QUIET]
SEGMENTER += ["model.net.channels=8", "model.net.auxiliary_channels=8", "model.window=null", "model.stride=null"]
SEGMENTER += ["backbone=piip_tiny", "model.net.backbone.sizes=[32,64]", "model.net.backbone.dims=[64,32]"]
SEGMENTER += ["model.net.backbone.patch=4", "model.net.backbone.depth=1"]
DETECTOR = ["experiment=piip_digit_objects", "data.scenes=16", "data.batch_size=8", "model.net.hidden=16", *QUIET]
DETECTOR += ["model.net.channels=16", "model.net.backbone.depth=1", "model.net.aligned=true"]


@pytest.fixture
def penstock(monkeypatch) -> Callable[..., int]:
    """The command line, each time as from a new shell."""

    def run(*words: str) -> int:
        monkeypatch.delenv("RUN_DIR", raising=False)
        return main(list(words))

    return run


def weights(words: list[str]) -> dict[str, Tensor]:
    """Random ones of the network that words compose, with gates that let all of it matter."""
    torch.manual_seed(0)
    (model,) = build(compose(words)[0], "model")
    state = model.net.state_dict()
    return {name: torch.randn_like(value) / 9 if name.endswith("_gate") else value for name, value in state.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    own = {name.removeprefix("net."): value for name, value in found.items()}
    return own.keys() == expected.keys() and all(torch.equal(own[name], value) for name, value in expected.items())


def metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text())


def test_a_classifier(penstock, tmp_path):
    own = weights(CLASSIFIER)
    file = tmp_path / "official.pth"
    torch.save({"model": official(own), "args": Namespace(lr=3e-5), "epoch": 19}, file)
    with pytest.warns(
        UserWarning, match=r"model\.net\.token: found class, but the authors' classifiers read the upper"
    ):
        assert penstock("validate", *CLASSIFIER, f"model.initial={file}", f"run_dir={tmp_path / 'a'}") == 0
    converted = tmp_path / "a" / "checkpoints" / "converted.ckpt"
    assert same(load_checkpoint(converted)["state_dict"], own)
    file.unlink()
    assert penstock("test", f"ckpt_path={converted}", f"run_dir={tmp_path / 'b'}") == 0
    assert penstock("test", *CLASSIFIER, f"model.initial={converted}", f"run_dir={tmp_path / 'c'}") == 0
    assert metrics(tmp_path / "b")["test/loss"] == metrics(tmp_path / "c")["test/loss"]


def test_a_segmenter_in_a_folder_of_deepspeed(penstock, tmp_path):
    own = weights(SEGMENTER)
    folder = tmp_path / "global_step80000"
    folder.mkdir()
    torch.save({"module": official(own, "backbone."), "ds_version": "0.8.0"}, folder / "mp_rank_00_model_states.pt")
    assert penstock("validate", *SEGMENTER, f"model.initial={folder}", f"run_dir={tmp_path / 'a'}") == 0
    converted = load_checkpoint(tmp_path / "a" / "checkpoints" / "converted.ckpt")
    assert same(converted["state_dict"], own)
    assert len(converted["trained_on"]["classes"]) == 11


def test_a_detector(penstock, tmp_path):
    own = weights(DETECTOR)
    for name, value in own.items():  # of the background, which mmdetection has no boxes and masks of
        if "roi_heads.box_predictor.bbox_pred" in name or "mask_fcn_logits" in name:
            value[: 4 if "bbox_pred" in name else 1] = 0
    file = tmp_path / "official.pth"
    state = official(own, "net.backbone.backbone.", MASK_RCNN)
    torch.save({"state_dict": state, "meta": {"CLASSES": ("a", "b")}, "optimizer": {}}, file)
    words = [*DETECTOR, f"model.initial={file}", "trainer.limit_val_batches=1"]
    assert penstock("validate", *words, f"run_dir={tmp_path / 'a'}") == 0
    assert same(load_checkpoint(tmp_path / "a" / "checkpoints" / "converted.ckpt")["state_dict"], own)


def test_wrong_files(penstock, tmp_path, capsys):
    """One line that names the file, what was found and what is expected."""
    (tmp_path / "folder").mkdir()
    contents = {
        "segmenter.pth": {"state_dict": official(weights(SEGMENTER), "backbone.")},
        "dino.pth": {"state_dict": {"backbone.branch1.pos_embed": torch.ones(1), "bbox_head.a": torch.ones(1)}},
        "other.pth": {"epoch": 3, "weights": 4},
        "wide.pth": {"model": official(weights([*CLASSIFIER, "model.net.dims=[128,64,32]"]))},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    said = {
        "segmenter.pth": "found a segmenter, expected a classifier: branch1.*, interactions.*, ...",
        "dino.pth": "found a detector with DINO's queries, expected a classifier",
        "other.pth": "found the entries epoch, weights, ..., expected a classifier",
        "wide.pth": "weights of another model, not of PiipClassifier: ",
        "absent.pth": "no such file",
        "folder": "no mp_rank_00_model_states.pt in this folder; expected a checkpoint",
    }
    for name, expected in said.items():
        words = [*CLASSIFIER, f"model.initial={tmp_path / name}", f"run_dir={tmp_path / 'run'}"]
        assert penstock("test", *words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert name in line
        assert expected in line
    assert not (tmp_path / "run").exists()
