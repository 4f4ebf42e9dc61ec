"""`teacher=`: a checkpoint, a run, or an experiment that is found, goes on, or is trained first."""

import json
import os
import signal
import subprocess
import threading

import pytest
import yaml

from penstock.lightning_modules.cli import main, teacher
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError

QUICK = """
defaults:
  - {base}
  - override /logger: csv
model: {{net: {{width: 8, blocks: 1}}}}
trainer: {{max_epochs: 2, check_val_every_n_epoch: 1, limit_val_batches: 1, accelerator: cpu, {more}}}
callbacks: {{metrics: null, samples: null}}
"""

STOP = "{class_path: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, stopping_threshold: 100}"


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A folder of own experiments: `flow`, and `second`, whose teacher is `flow`."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    flow = QUICK.format(base="rectified_flow_digits", more="limit_train_batches: 2, limit_test_batches: 1")
    (folder / "flow.yaml").write_text("# @package _global_\n# penstock fit experiment=flow" + flow)
    second = QUICK.format(base="reflow_digits", more="limit_train_batches: 2, limit_test_batches: 1")
    second += "teacher: flow\ndata: {n: 256, steps: 1, pairs_batch: 128, shard: 128}\n"
    second = second.replace("samples: null", "samples: null, straightness: {n: 32, steps: 10}")
    (folder / "second.yaml").write_text("# @package _global_\n# penstock fit experiment=second" + second)
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path / "conf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def penstock(*words):
    """A command in this process; what it starts is a process of its own."""
    os.environ.pop("RUN_DIR", None)
    assert main([*words]) == 0


def runs(folder, name):
    return sorted(p.parent for p in (folder / "runs" / name).glob("*/config.yaml"))


def test_one_command_trains_the_teacher_and_finds_it_afterwards_also_for_a_third_flow(quick, capsys):
    penstock("fit", "experiment=second")
    (flow,), (second,) = runs(quick, "flow"), runs(quick, "second")
    assert "teacher: trains first" in capsys.readouterr().err
    config = yaml.safe_load((second / "config.yaml").read_text())
    checkpoint = str(flow / "checkpoints" / "last.ckpt")
    assert config["data"]["init_args"]["teacher"] == config["model"]["init_args"]["initial"] == checkpoint
    assert "test/loss" in json.loads((second / "metrics.json").read_text())
    (made,) = (flow / "pairs").glob("[!.]*")
    assert len(list(made.glob("shard_*"))) == 2
    stamps = {p: p.stat().st_mtime_ns for p in made.iterdir()}

    penstock("fit", "experiment=second")
    assert f"teacher: {flow.relative_to(quick)}/checkpoints/last.ckpt" in capsys.readouterr().err
    assert runs(quick, "flow") == [flow]
    assert {p: p.stat().st_mtime_ns for p in made.iterdir()} == stamps
    a, b = (json.loads((run / "metrics.json").read_text()) for run in runs(quick, "second"))
    assert a["test/loss"] == b["test/loss"]

    penstock("fit", "experiment=second", "teacher=second")
    *_, second, third = runs(quick, "second")
    config = yaml.safe_load((third / "config.yaml").read_text())
    checkpoint = str(second / "checkpoints" / "last.ckpt")
    assert config["data"]["init_args"]["teacher"] == config["model"]["init_args"]["initial"] == checkpoint
    (made,) = (second / "pairs").glob("[!.]*")
    assert json.loads((made / "pairs.json").read_text())["teacher"] == checkpoint
    c = json.loads((third / "metrics.json").read_text())
    assert c["straightness/teacher"] == pytest.approx(b["straightness"], rel=1e-2)


def test_an_unfinished_teacher_goes_on_and_another_one_is_passed_over(quick, capsys):
    penstock("fit", "experiment=flow", "model.net.width=4")
    penstock("fit", "experiment=flow", f"+callbacks.stop={STOP}")
    other, unfinished = runs(quick, "flow")
    assert not teacher._finished(unfinished)
    found = teacher.find_or_train("flow")
    assert found == str(unfinished / "checkpoints" / "last.ckpt")
    assert "teacher: goes on" in capsys.readouterr().err
    assert teacher._finished(unfinished)
    assert runs(quick, "flow") == [other, unfinished]
    assert teacher.find_or_train("flow") == found
    assert teacher.find_or_train(str(other)) == str(other / "checkpoints" / "last.ckpt")


def test_printing_trains_nothing(quick, capsys):
    assert main(["fit", "experiment=second", "--print"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["teacher"] == "flow"
    assert not (quick / "runs").exists()


def test_a_checkpoint_or_a_run_by_path(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"no checkpoints/last.ckpt in this folder"):
        teacher.find_or_train(str(tmp_path))
    path.touch()
    for given in (tmp_path, path):
        tree = compose(["experiment=reflow_digits", f"teacher={given}"], teacher.find_or_train)[0]
        assert tree["model"]["init_args"]["initial"] == tree["data"]["init_args"]["teacher"] == str(path)


def test_a_second_stage_starts_from_the_first_and_has_its_pairs(tmp_path):
    def asked(*words):
        found = []
        tree = compose([*words], lambda run, key: found.append((key, run)) or f"{run}.ckpt")[0]
        return found, tree["model"]["init_args"]["initial"], tree["data"]["init_args"]["teacher"]

    stages = {
        "instaflow_sd15_lpips": ("reflow_sd15", "instaflow_sd15"),
        "rectified_flow_pp_cifar10_real": ("edm_cifar10", "rectified_flow_pp_cifar10"),
    }
    for name, (flow, first) in stages.items():
        experiment = f"experiment={name}"
        both = [("teacher", flow), ("initial", first)]
        assert asked(experiment) == (both, f"{first}.ckpt", f"{flow}.ckpt")
        assert asked(experiment, "model.initial=a") == (both[:1], "a", f"{flow}.ckpt")
        assert asked(experiment, "initial=a") == ([both[0], ("initial", "a")], "a.ckpt", f"{flow}.ckpt")
    flow = "rectified_flow_digits"
    assert asked("experiment=reflow_digits") == ([("teacher", flow)], f"{flow}.ckpt", f"{flow}.ckpt")


def test_a_mistyped_start_is_one_line(tmp_path, capsys):
    path = tmp_path / "last.ckpt"
    path.touch()
    words = ["experiment=instaflow_sd15_lpips", f"teacher={path}", "initial=instaflow_sd_15"]
    assert main(["fit", *words]) == 2
    error = capsys.readouterr().err
    expected = "initial=instaflow_sd_15: no such file, run folder or experiment (did you mean 'instaflow_sd15'?)"
    assert error == f"penstock: {expected}\n"


def test_a_mistyped_teacher_is_one_line(capsys):
    assert main(["fit", "experiment=reflow_digits", "teacher=rectified_flow_digit"]) == 2
    assert (
        "teacher=rectified_flow_digit: no such file, run folder or experiment (did you mean" in capsys.readouterr().err
    )


def test_a_stopped_process_stops_the_teacher_that_it_trains(tmp_path, monkeypatch):
    children = []

    def child(command, env):
        children.append(start(["sleep", "100"]))
        return children[-1]

    start = subprocess.Popen
    monkeypatch.setattr(teacher.subprocess, "Popen", child)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert teacher._fit([], tmp_path) == children[0].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_teacher_that_fails_is_one_line(quick, monkeypatch):
    monkeypatch.setattr(teacher, "_fit", lambda words, run: 1)
    with pytest.raises(UserError, match=r"its training in .* ended with exit code 1"):
        teacher.find_or_train("flow")
    monkeypatch.setattr(teacher, "_fit", lambda words, run: 130)
    with pytest.raises(KeyboardInterrupt):
        teacher.find_or_train("flow")
