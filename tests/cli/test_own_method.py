"""Adding a method touches only new files: those of docs/add_a_method.md, run from a folder of the user's own."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.conf import options

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_method.md"
SECTION = re.compile(r"^## ", re.MULTILINE)
FILE = re.compile(r"\A\d\. `([^`]+)`\n[^`]*(?:`[^`\n]+`[^`]*)*^```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
TINY = ["logger=csv", "model.net.width=8", "model.net.blocks=1", "trainer.max_epochs=1", "callbacks.metrics.n=20"]
TINY += ["trainer.limit_train_batches=2", "trainer.check_val_every_n_epoch=1", "callbacks.metrics.steps=[1,2]"]
TINY += ["callbacks.samples.rows=1", "callbacks.samples.steps=1"]


def write_files(folder):
    """The files of the page, under the same names, with the class found in the folder itself."""
    for name, text in (found.groups() for part in SECTION.split(PAGE.read_text()) if (found := FILE.match(part))):
        path = folder / name.removeprefix("lightning_modules/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("penstock.lightning_modules.clean_flow", "clean_flow"))
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def run(own):
    env = {k: v for k, v in os.environ.items() if k not in ("RUN_DIR", "PL_GLOBAL_SEED")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "PENSTOCK_CONF": "conf", "PENSTOCK_CACHE": str(own / "cache")}
    words = [sys.executable, "-m", "penstock.lightning_modules", "fit", "experiment=clean_flow_digits", *TINY]
    done = subprocess.run(words, cwd=own, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (config,) = own.glob("runs/clean_flow_digits/*/config.yaml")
    return config.parent


@pytest.fixture
def inside(own, monkeypatch):
    """The same folder for this process."""
    monkeypatch.chdir(own)
    monkeypatch.syspath_prepend(str(own))
    monkeypatch.setenv("PENSTOCK_CONF", "conf")
    monkeypatch.setenv("RUN_DIR", str(own / "other"))
    monkeypatch.delitem(sys.modules, "clean_flow", raising=False)


def test_the_page_holds_the_files_it_counts(own):
    files = {str(p.relative_to(own)) for p in own.rglob("*") if p.suffix in (".py", ".yaml") and "runs" not in p.parts}
    method = {"clean_flow.py", "conf/model/clean_flow.yaml", "conf/experiment/clean_flow_digits.yaml"}
    assert files == {*method, "tests/lightning_modules/test_clean_flow.py"}


@pytest.mark.usefixtures("inside")
def test_list_shows_the_method_and_its_experiment(capsys):
    assert main(["list", "methods", "experiments"]) == 0
    out = capsys.readouterr().out
    assert "Clean flow: the network predicts the data" in out
    assert "penstock fit experiment=clean_flow_digits" in out


def test_metrics_pictures_and_checkpoint_work_on_it(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"fd_pixels/1", "fd_pixels/2", "val/loss", "test/loss"} <= metrics.keys()
    assert {"step_000002.png", "test.png"} <= {p.name for p in (run / "samples").iterdir()}
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.usefixtures("inside")
def test_sample_works_on_it(run, capsys):
    assert main(["sample", f"ckpt_path={run}/checkpoints/last.ckpt", "n=4", "steps=2"]) == 0
    assert "2 network calls each" in capsys.readouterr().out


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("name", options("solver"))
def test_sample_says_that_there_is_no_solver_to_choose(name, run, capsys):
    assert main(["sample", f"ckpt_path={run}/checkpoints/last.ckpt", f"solver={name}"]) == 2
    assert capsys.readouterr().err == f"penstock: solver={name}: CleanFlow has no solver to choose\n"


@pytest.mark.usefixtures("inside")
def test_predict_says_what_is_lacking_and_leaves_no_folder(run, capsys, monkeypatch):
    monkeypatch.delenv("RUN_DIR")
    assert main(["predict", f"ckpt_path={run}/checkpoints/last.ckpt"]) == 2
    (err,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penstock: ")]
    assert err == "penstock: predict: CleanFlow has no predict_step; expected one that returns a dict of tensors"
    assert not (run / "predict").exists()


@pytest.mark.usefixtures("inside")
def test_its_keys_are_checked_like_any_other(capsys):
    assert main(["fit", "experiment=clean_flow_digits", "model.guidence=2"]) == 2
    assert "did you mean 'guidance'?" in capsys.readouterr().err


@pytest.mark.usefixtures("inside")
def test_its_own_test_passes(own):
    tests = runpy.run_path(str(own / "tests" / "lightning_modules" / "test_clean_flow.py"))
    tests["test_one_point_is_reached_in_any_number_of_steps"]()
