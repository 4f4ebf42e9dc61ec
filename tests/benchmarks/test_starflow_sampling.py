"""The benchmarks of sampling run on a tiny checkpoint and write their files; no statement about speed."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from penstock.benchmarks import gs_jacobi, starflow_sampling
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import _run, main

TINY = ["model=starflow_v", "net=starflow", "data=moving_digits", "callbacks=base", "logger=csv", "frames=3"]
TINY += ["model.net.dim=32", "model.net.depths=[1,1]", "model.net.head_dim=32", "model.net.patch=4", "model.net.side=4"]
TINY += ["model.net.text_dim=32", "model.text.class_path=penstock.lightning_modules.nets.text_encoder.HashedText"]
TINY += ["model.text.length=4", "model.noise=0.2", "data.n_train=32", "data.n_test=4", "data.batch_size=16"]
TINY += ["trainer.max_steps=1", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUN_DIR", str(folder))
        assert _run(["fit", *TINY]) == 0
    return str(folder / "checkpoints" / "last.ckpt")


@pytest.fixture(autouse=True)
def threads():
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)


def test_every_way_makes_the_same_clips_in_no_more_calls(checkpoint, tmp_path):
    assert starflow_sampling.main([checkpoint, "--n", "2", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "starflow_sampling.json").read_text())["rows"]
    assert [row["clips"] for row in rows] == [2] * 8
    assert rows[0]["calls"] == 3 * 16 + 16
    assert all(row["calls"] <= rows[0]["calls"] for row in rows)
    assert all(float(row["largest difference"]) < 1e-3 for row in rows)
    assert all(float(row["its largest difference"]) < 1e-3 for row in rows)


def test_chosen_inverses_and_those_by_hand_make_the_same_clips(checkpoint, tmp_path):
    words = [checkpoint, "--data", "3", "--n", "2", "--segments", "4", "--rounds", "1", "--out", str(tmp_path)]
    assert gs_jacobi.main(words) == 0
    found = json.loads((tmp_path / "gs_jacobi.json").read_text())
    assert [(block["tokens"], block["IGM frame"] is None) for block in found["blocks"]] == [(16, True), (48, False)]
    rows = {row["inverse"]: row for row in found["rows"]}
    assert len(rows) == 10
    assert rows["token by token"]["calls"] == 3 * 16 + 16
    assert rows["token by token"]["sweeps of a token"] == "2.0"
    assert all(float(row["largest difference"]) < 1e-2 for row in rows.values())
    chosen = yaml.safe_load((tmp_path / "gs_jacobi.yaml").read_text())
    model = model_from_checkpoint(checkpoint, **chosen)
    assert model.inverse.chunk in (12, 48)
    assert len(model.shallow) == 1
    words = ["sample", f"ckpt_path={checkpoint}", "n=2", "steps=100", "device=cpu"]
    for name in ("first", "chosen"):
        inverse = [f"inverse={tmp_path}/gs_jacobi.yaml"] if name == "chosen" else []
        assert _run([*words, f"out={tmp_path}/{name}", *inverse]) == 0
    kept = {name: load_file(tmp_path / name / "samples.safetensors")["samples"] for name in ("first", "chosen")}
    torch.testing.assert_close(kept["chosen"], kept["first"], rtol=0, atol=1e-2)
    report = json.loads((tmp_path / "chosen" / "report.json").read_text())
    assert report["inverse"] == f"{tmp_path}/gs_jacobi.yaml"
    assert report["calls_of_blocks"] != json.loads((tmp_path / "first" / "report.json").read_text())["calls_of_blocks"]


@pytest.mark.parametrize(
    ("text", "line"),
    [(None, "expected a YAML file with the keys inverse and shallow"), ("solver: 1", "it has solver;")],
)
def test_another_file_is_no_inverse(text, line, checkpoint, tmp_path, capsys):
    if text:
        (tmp_path / "other.yaml").write_text(text)
    assert main(["sample", f"ckpt_path={checkpoint}", "n=1", f"inverse={tmp_path}/other.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


def test_arguments_stand_beside_the_class(checkpoint, tmp_path):
    path = tmp_path / "slide.yaml"
    path.write_text("inverse: {class_path: penstock.lightning_modules.flow.sliding.Sliding, window: 2}")
    words = [f"ckpt_path={checkpoint}", "n=1", "steps=100", "device=cpu", f"inverse={path}", f"out={tmp_path}/out"]
    assert _run(["sample", *words]) == 0
    calls = json.loads((tmp_path / "out" / "report.json").read_text())["calls_of_blocks"]
    assert 3 * 16 // 2 <= max(calls) <= 3 * 16
