"""Real processes that are interrupted, killed or go wrong, at moments of their own choosing."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import harness
import pytest
from methods import words

LONG = ["trainer.max_epochs=12", "trainer.check_val_every_n_epoch=4"]
KILLED = ["rectified_flow_digits", "rectified_flow_points", "reflow_digits", "instaflow_digits"]
KILLED += ["fastflow_digits", "sepc_digits", "piip_digits"]
SLOW = ["+callbacks.slow={class_path: faults.Slow, seconds: 0.05}"]


def start(run: Path, *all_words: str) -> subprocess.Popen:
    environment = harness.variables(RUN_DIR=str(run))
    return subprocess.Popen(
        harness.command("fit", *all_words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < until, f"no {path} after two minutes"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undisturbed runs of 12 epochs, by method."""
    known = {}

    def get(method):
        if method not in known:
            known[method] = tmp_path_factory.mktemp("whole")
            assert harness.penstock("fit", *words(method), *LONG, *SLOW, run=known[method]).code == 0
        return known[method]

    return get


def assert_resumed_as(whole: Path, run: Path) -> None:
    done = harness.penstock("fit", harness.last_checkpoint(run))
    assert done.code == 0, done.err[-2000:]
    harness.same_state(run, whole)
    assert harness.metrics(run) == harness.metrics(whole)


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_the_run_goes_on(sent, whole, tmp_path):
    run, method = tmp_path / "run", "rectified_flow_points"
    never = ["callbacks.checkpoint.every_n_train_steps=null", "callbacks.checkpoint.every_n_epochs=1000"]
    process = start(run, *words(method), *LONG, *SLOW, *never)
    wait_for(run / "config.yaml", process)
    time.sleep(0.7)
    assert not (run / "checkpoints" / "last.ckpt").exists()
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-3000:]
    assert "Traceback" not in err
    go_on = out.strip().splitlines()[-1]
    assert go_on.startswith("interrupted; go on with: penstock fit ckpt_path=")
    assert go_on.endswith(f"{run.name}/checkpoints/last.ckpt")
    step = harness.state(run)["/global_step"]
    assert 0 < step < harness.state(whole(method))["/global_step"]
    assert list(harness.metrics(run)) == list(range(step))
    assert_resumed_as(whole(method), run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert harness.penstock("fit", *words("rectified_flow_points"), "trainer.max_epochs=2", run=folder).code == 0
    return folder


@pytest.mark.parametrize(("step", "sent"), [(3, signal.SIGTERM), (4, signal.SIGINT)])
def test_a_signal_before_a_validation_waits_for_it(step, sent, undisturbed, tmp_path):
    """Step 4 ends an epoch: its validation comes before the run stops, for a resumed run would not make it."""
    fault = f"+callbacks.fault={{class_path: faults.Interrupt, step: {step}, sent: {int(sent)}}}"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    done = harness.penstock("fit", *words("rectified_flow_points"), "trainer.max_epochs=2", fault, run=tmp_path)
    assert done.code == 130, done.err[-3000:]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert harness.state(tmp_path)["/global_step"] == step
    assert ("val/loss" in harness.metrics(tmp_path)[step - 1]) == (step == 4)
    assert_resumed_as(undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", KILLED)
def test_kill_at_random_moments(method, whole, tmp_path):
    """Killed three times, wherever it is: starting, training, writing a file; the last time it is left alone."""
    run, moments = tmp_path / "run", random.Random(method)
    first = [*words(method), *LONG, *SLOW]
    last = run / "checkpoints" / "last.ckpt"
    steps = []
    for _ in range(3):
        process = start(run, *([harness.last_checkpoint(run)] if last.exists() else first))
        wait_for(last, process)
        before = last.stat().st_mtime_ns
        while last.stat().st_mtime_ns == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        steps.append(harness.state(run)["/global_step"])
    assert steps == sorted(set(steps))
    assert_resumed_as(whole(method), run)


@pytest.mark.slow
def test_not_a_number_on_one_rank_of_the_launcher(tmp_path):
    bad = "+callbacks.bad={class_path: faults.BadLoss, step: 2, rank: 1}"
    two = ["strategy=ddp", "trainer.devices=2"]
    process = start(tmp_path, *words("rectified_flow_points"), *two, bad)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err[-3000:]
    lines = [line for line in (out + err).splitlines() if "not finite" in line]
    assert len(lines) == 1, err[-3000:]
    assert lines[0].startswith(
        "penstock: loss is not finite at step 2 of epoch 0: nan on rank 1 in the batch of samples"
    )
    assert harness.state(tmp_path)["/global_step"] == 2
