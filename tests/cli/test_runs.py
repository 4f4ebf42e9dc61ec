"""Whole runs through the command line: run folder, re-run, resume, sweeps, two ranks, torchrun."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from penstock.lightning_modules.cli import main

TINY = ["experiment=rectified_flow_digits", "model.net.width=8", "model.net.blocks=1", "trainer.max_epochs=1"]
TINY += ["trainer.limit_train_batches=3", "trainer.check_val_every_n_epoch=1", "callbacks.checkpoint.every_n_epochs=1"]
TINY += [
    "callbacks.metrics.n=20",
    "callbacks.metrics.steps=[1,2]",
    "callbacks.samples.rows=1",
    "callbacks.samples.steps=1",
]
CSV = [*TINY, "logger=csv"]


PROGRAM = (sys.executable, "-m", "penstock.lightning_modules")


def penstock(*words, cwd, python=PROGRAM, **environment):
    """The program as a process of its own."""
    env = {k: v for k, v in os.environ.items() if k not in ("RUN_DIR", "PL_GLOBAL_SEED")}
    env |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environment}
    done = subprocess.run([*python, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def here(*words, cwd, **environment):
    """The same in this process, which spares the imports."""
    os.environ.pop("RUN_DIR", None)
    os.environ |= environment
    with contextlib.chdir(cwd):
        assert main([*words]) == 0


def runs(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.rglob("config.yaml") if "wandb" not in p.parts)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    penstock("fit", *TINY, cwd=folder)
    (run,) = runs(folder)
    return run


def test_run_folder_holds_what_it_promises(first):
    assert first.parent.name == "rectified_flow_digits"
    metrics = json.loads((first / "metrics.json").read_text())
    assert {
        "fd_pixels/1",
        "fd_pixels/2",
        "label_accuracy/2",
        "train_seconds",
        "val/loss",
        "test/loss",
    } <= metrics.keys()
    assert all(isinstance(v, float) for v in metrics.values())
    assert (first / "metrics.csv").read_text().startswith("step,")
    assert (first / "checkpoints" / "last.ckpt").is_file()
    assert list((first / "samples").glob("*.png"))
    assert list((first / "wandb").glob("offline-run-*"))
    config = yaml.safe_load((first / "config.yaml").read_text())
    assert type(config["seed_everything"]) is int
    assert config["trainer"]["default_root_dir"] is None


def test_a_saved_configuration_re_runs_to_the_same_numbers(first, tmp_path):
    here("fit", "--config", str(first / "config.yaml"), cwd=tmp_path)
    (again,) = runs(tmp_path)
    assert again != first
    old, new = (json.loads((run / "metrics.json").read_text()) for run in (first, again))
    same = {k for k in old if not k.startswith(("train_seconds", "throughput"))}
    assert {k: old[k] for k in same} == {k: new[k] for k in same}


@pytest.mark.parametrize("dialect", ["words", "flags"])
def test_print_shows_the_complete_configuration_of_a_checkpoint(dialect, first, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = f"{first}/checkpoints/last.ckpt"
    words = [f"ckpt_path={ckpt}", "model.lr=0.3", "trainer.max_epochs=7"]
    if dialect == "flags":
        words = ["--config", f"{first}/config.yaml", *words]
    before = sorted(first.rglob("*"))
    assert main(["fit", *words, "--print"]) == 0
    expected = yaml.safe_load((first / "config.yaml").read_text())
    expected["ckpt_path"] = ckpt
    expected["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.3
    expected["trainer"]["max_epochs"] = 7
    assert yaml.safe_load(capsys.readouterr().out) == expected
    assert not list(tmp_path.iterdir())
    assert sorted(first.rglob("*")) == before


def test_print_of_a_checkpoint_checks_the_words(first, capsys):
    assert main(["fit", f"ckpt_path={first}/checkpoints/last.ckpt", "model.lrr=0.3", "--print"]) == 2
    assert "did you mean 'lr'?" in capsys.readouterr().err


def test_test_verb_takes_everything_from_the_checkpoint(first, tmp_path):
    here("test", f"ckpt_path={first}/checkpoints/last.ckpt", cwd=tmp_path, RUN_DIR=str(tmp_path / "t"))
    fitted = json.loads((first / "metrics.json").read_text())
    tested = json.loads((tmp_path / "t" / "metrics.json").read_text())
    for key in ("test/loss", "fd_pixels/1", "label_accuracy/2"):
        assert tested[key] == pytest.approx(fitted[key], rel=1e-6)


def test_user_wins_over_hyper_parameters_of_the_checkpoint(first, tmp_path):
    words = [*CSV, "model.guidance=3.5", f"ckpt_path={first}/checkpoints/last.ckpt"]
    here("test", *words, cwd=tmp_path)
    (run,) = runs(tmp_path)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["guidance"] == 3.5
    from lightning.pytorch.cli import LightningCLI

    assert hasattr(LightningCLI, "_parse_ckpt_path"), "the method that Lab overrides has another name upstream"


def test_predict_and_validate(first, tmp_path):
    for verb in ("validate", "predict"):
        here(verb, f"ckpt_path={first}/checkpoints/last.ckpt", cwd=tmp_path, RUN_DIR=str(tmp_path / verb))
    assert "val/loss" in json.loads((tmp_path / "validate" / "metrics.json").read_text())
    assert list((tmp_path / "predict" / "predictions").glob("*.safetensors"))
    assert list((tmp_path / "predict" / "predictions").glob("*.png"))


def test_fused_optimiser_is_clipped_under_bf16(tmp_path):
    words = ["perf=bf16", "callbacks.metrics=null", "model.optimizer.fused=true", "trainer.gradient_clip_val=1.0"]
    here("fit", *CSV, *words, cwd=tmp_path)


@pytest.mark.slow
def test_sweep_of_two_jobs(tmp_path):
    done = penstock("fit", "-m", *CSV, "seed_everything=1,2", "objective=fd_pixels/2", cwd=tmp_path)
    folders = runs(tmp_path)
    assert len(folders) == 2
    seeds = {yaml.safe_load((f / "config.yaml").read_text())["seed_everything"] for f in folders}
    assert seeds == {1, 2}
    assert "penstock compare" in done.stdout
    penstock("compare", *map(str, folders), f"out={tmp_path}/c", cwd=tmp_path)
    text = (tmp_path / "c" / "compare.md").read_text()
    assert "seed_everything" in text
    assert "fd_pixels/2" in text
    assert (tmp_path / "c" / "compare.png").stat().st_size > 1000


TWO = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]


@pytest.mark.slow
def test_two_ranks_share_one_folder(tmp_path):
    penstock("fit", *CSV, *TWO, cwd=tmp_path)
    assert len(runs(tmp_path)) == 1


@pytest.mark.slow
def test_two_ranks_inside_a_sweep(tmp_path):
    penstock("fit", "-m", *CSV, *TWO, "seed_everything=1,2", cwd=tmp_path)
    assert len(runs(tmp_path)) == 2


@pytest.mark.slow
def test_torchrun(tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    program = (*launcher, "-m", "penstock.lightning_modules")
    penstock("fit", *CSV, *TWO, cwd=tmp_path, python=program, RUN_DIR=str(tmp_path / "runs" / "a" / "1"))
    assert len(runs(tmp_path)) == 1


def test_compare_names_a_folder_that_is_no_run(capsys, tmp_path):
    assert main(["compare", str(tmp_path)]) == 2
    assert "no metrics.json" in capsys.readouterr().err
