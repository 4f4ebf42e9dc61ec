"""A run that was stopped and resumed holds the same bits, and the same metrics.csv, as one that never was."""

import shutil

import harness
import pytest
from methods import METHODS, mostly_slow, words

WATCHING = ["callbacks.checkpoint.every_n_train_steps=null", "callbacks.checkpoint.every_n_epochs=1"]
WATCHING += ["callbacks.checkpoint.monitor=val/loss", "trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"]
SETUPS = {
    "saving each step": [],
    "two workers": ["data.num_workers=2"],
    "watching a metric": WATCHING,
    "validating within epochs": ["trainer.val_check_interval=2"],
    "accumulating": ["trainer.accumulate_grad_batches=2"],
    "saving each epoch": ["callbacks.checkpoint.every_n_train_steps=null"],
}
CUTS = ["step1", "step3", "validated4", "epoch4", "step6"]
QUICK = ("rectified_flow_digits", "reflow_digits", "rectified_flow_ot", "twinflow_digits")
OTHER = [("two workers", "step2"), ("two workers", "epoch4"), ("watching a metric", "validated8")]
OTHER += [("validating within epochs", "step1"), ("validating within epochs", "validated2")]
OTHER += [("accumulating", "step1"), ("accumulating", "epoch2")]
OTHER += [("saving each epoch", "epoch4"), ("saving each epoch", "step6")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs never stopped, by method and setup: (run folder, folder of the cuts)."""
    known = {}

    def get(method, setup="saving each step"):
        if (method, setup) not in known:
            folder = tmp_path_factory.mktemp("whole")
            run, cuts = folder / "run", folder / "cuts"
            copies = f"+callbacks.cuts={{class_path: faults.Cuts, out: '{cuts}'}}"
            assert harness.penstock("fit", *words(method), *SETUPS[setup], copies, run=run).code == 0
            known[method, setup] = run, cuts
        return known[method, setup]

    return get


def resumed(copy, folder, *more):
    stopped = folder / "stopped"
    shutil.copytree(copy, stopped)
    assert harness.penstock("fit", harness.last_checkpoint(stopped), *more).code == 0
    return stopped


def assert_same(run, other):
    harness.same_state(run, other)
    assert harness.metrics(run) == harness.metrics(other)


def at_each_cut():
    """Every method within an epoch; at the other moments three of them, the rest in the slow suite."""
    for method in METHODS:
        for cut in CUTS:
            quick = cut == "step3" or method in QUICK
            yield pytest.param(method, cut, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("method", "cut"), at_each_cut())
def test_killed_and_resumed(method, cut, whole, tmp_path):
    run, cuts = whole(method)
    assert_same(resumed(cuts / cut, tmp_path), run)


@pytest.mark.parametrize(("setup", "cut"), OTHER)
def test_killed_and_resumed_in_other_setups(setup, cut, whole, tmp_path):
    run, cuts = whole("rectified_flow_digits", setup)
    assert_same(resumed(cuts / cut, tmp_path), run)


@pytest.mark.parametrize("method", mostly_slow(*QUICK))
def test_a_finished_run_goes_on(method, whole, tmp_path):
    finished = tmp_path / "finished"
    assert harness.penstock("fit", *words(method), "trainer.max_epochs=1", run=finished).code == 0
    run, _ = whole(method)
    longer = resumed(finished, tmp_path, "trainer.max_epochs=2")
    assert_same(longer, run)


def test_workers_change_nothing(whole):
    assert_same(whole("rectified_flow_digits", "two workers")[0], whole("rectified_flow_digits")[0])
