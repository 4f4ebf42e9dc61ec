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
QUICK = ("rectified_flow_digits", "reflow_digits")
SAME = ("rectified_flow_points", "rectified_flow_pp_digits", "boss_digits", "piip_digit_objects", "piip_digit_masks")
OTHER = [("two workers", "step2"), ("watching a metric", "validated8"), ("validating within epochs", "validated2")]
OTHER += [("accumulating", "step1"), ("saving each epoch", "step6")]
MORE = [("two workers", "epoch4"), ("validating within epochs", "step1"), ("accumulating", "epoch2")]
MORE += [("saving each epoch", "epoch4")]


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
    """Quick: each kind of method within an epoch, `QUICK` at every moment; `SAME` differ from others in no state."""
    for method in METHODS:
        for cut in CUTS:
            quick = method in QUICK or (cut == "step3" and method not in SAME)
            yield pytest.param(method, cut, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("method", "cut"), at_each_cut())
def test_killed_and_resumed(method, cut, whole, tmp_path):
    run, cuts = whole(method)
    assert_same(resumed(cuts / cut, tmp_path), run)


@pytest.mark.parametrize(("setup", "cut"), [*OTHER, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)])
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
