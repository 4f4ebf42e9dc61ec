"""A run that was stopped and resumed holds the same bits, and the same metrics.csv, as one that never was."""

import shutil

import harness
import pytest
from methods import METHODS, words

AFTER_STEPS = [1, 3, 4, 6]
CUTS = ["step1", "step3", "step4", "validated0", "epoch0", "step6"]


def with_cuts(out):
    return f"+callbacks.cuts={{class_path: faults.Cuts, out: '{out}', steps: {AFTER_STEPS}}}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs never stopped, by method: (run folder, folder of the cuts)."""
    known = {}

    def get(method):
        if method not in known:
            folder = tmp_path_factory.mktemp(method)
            run, cuts = folder / "whole", folder / "cuts"
            assert harness.penstock("fit", *words(method), with_cuts(cuts), run=run).code == 0
            known[method] = run, cuts
        return known[method]

    return get


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("method", METHODS)
def test_resumed_at(method, cut, whole, tmp_path):
    run, cuts = whole(method)
    stopped = tmp_path / "stopped"
    shutil.copytree(cuts / cut, stopped)
    assert harness.penstock("fit", harness.last_checkpoint(stopped)).code == 0
    harness.same_state(stopped, run)
    assert harness.metrics(stopped) == harness.metrics(run)
