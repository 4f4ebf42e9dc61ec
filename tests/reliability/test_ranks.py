"""Two gloo ranks under DDP: resumed as never stopped, the same numbers as one rank, one line when one goes wrong."""

import json

import harness
import pytest
import torch
from methods import ALIKE, DOUBLE, METHODS, mostly_slow, words

from penstock.lightning_modules.checkpoints import load_checkpoint

TWO = ["strategy=ddp", "trainer.devices=2"]
DIGITS = "rectified_flow_digits"
CUTS = [(method, "step3") for method in METHODS]
CUTS += [(method, "epoch4") for method in (DIGITS, "rectified_flow_ot")]
NOTHING_KEPT = {"fastflow_digits": ["model.cache_features=false"]}  # images are looked at in every step
QUICK = (DIGITS, "reflow_digits", "boss_digits", "sepc_digits")


def method_words(method, *more):
    return [*words(method), *TWO, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def reports(request, folder):
    """How the jobs of all tests that are run ended, by name: [of rank 0, of rank 1]; one pair of processes for them."""
    jobs = {}

    def job(name, *all_words):
        jobs[name] = {"words": list(all_words), "run": str(folder / name)}

    def chosen(test, *names):
        own = [item for item in request.session.items if item.path == request.path and item.originalname == test]
        return [tuple(item.callspec.params[name] for name in names) for item in own]

    pairs = chosen("test_killed_and_resumed", "method", "cut")
    for method in dict.fromkeys([DIGITS, *(method for method, _ in pairs)]):
        cuts = f"+callbacks.cuts={{class_path: faults.Cuts, out: '{folder / 'cuts' / method}'}}"
        job(method, *method_words(method, cuts))
    for method, cut in pairs:
        job(f"cuts/{method}/{cut}", harness.last_checkpoint(folder / "cuts" / method / cut))
    for (method,) in chosen("test_two_ranks_train_and_validate_as_one", "method"):
        job(f"alike/{method}", *method_words(method, *ALIKE.get(method, [])))
    job("two_workers", *method_words(DIGITS, "data.num_workers=2"))
    masks = f"+callbacks.masks={{class_path: faults.DropoutMasks, out: '{folder / 'masks'}'}}"
    job("masks", *method_words(DIGITS, masks))
    job("odd", *method_words(DIGITS, "data.batch_size=21"))
    for method, rank in chosen("test_not_a_number_on_one_rank", "method", "rank"):
        bad = f"+callbacks.bad={{class_path: faults.BadLoss, step: 5, rank: {rank}}}"
        job(f"bad/{method}/{rank}", *method_words(method, bad, *NOTHING_KEPT.get(method, [])))
    ended = harness.on_ranks(2, list(jobs.values()), folder / "jobs")
    return {name: [report[i] for report in ended] for i, name in enumerate(jobs)}


@pytest.mark.parametrize(
    ("method", "cut"),
    [pytest.param(*pair, marks=[] if pair[0] in QUICK else pytest.mark.slow) for pair in CUTS],
)
def test_killed_and_resumed(method, cut, reports, folder):
    assert [done.code for done in reports[method]] == [0, 0], reports[method][0].err[-1000:]
    stopped = f"cuts/{method}/{cut}"
    assert [done.code for done in reports[stopped]] == [0, 0], reports[stopped][0].err[-1000:]
    harness.same_state(folder / stopped, folder / method)
    assert harness.metrics(folder / stopped) == harness.metrics(folder / method)


def test_workers_change_nothing(reports, folder):
    harness.same_state(folder / "two_workers", folder / DIGITS)


@pytest.mark.parametrize("method", mostly_slow(DIGITS, "sepc_digits"))
def test_two_ranks_train_and_validate_as_one(method, reports, folder, tmp_path):
    """The batch of one rank or half of it on each of two; digits: 109 validation samples, the last batch of 1."""
    assert harness.penstock("fit", *words(method), *ALIKE.get(method, []), run=tmp_path).code == 0
    ended = reports[f"alike/{method}"]
    assert [done.code for done in ended] == [0, 0], ended[0].err[-1000:]
    one, two = harness.metrics(tmp_path), harness.metrics(folder / "alike" / method)
    names = {name for name in one[7] if name.startswith("val/")}
    assert names
    for step in (3, 7):
        found, expected = ({name: float(rows[step][name]) for name in names} for rows in (two, one))
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
    if method == DIGITS or DOUBLE in ALIKE.get(method, []):
        found, expected = (harness.weights(run) for run in (folder / "alike" / method, tmp_path))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ranks_drop_different_activations(reports, folder):
    zero, one = (json.loads((folder / "masks" / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(zero) == len(one) == 8
    assert len({str(mask) for mask in [*zero, *one]}) == 16


def test_a_batch_that_ranks_cannot_share(reports):
    first, second = reports["odd"]
    assert (first.code, second.code) == (2, 2)
    line = "penstock: data.batch_size: found 21, which 2 ranks cannot share evenly; nearest: 20 or 22"
    assert [said for said in first.err.splitlines() if said.startswith("penstock:")] == [line]
    assert "penstock:" not in second.err


BAD = [pytest.param(name, 1, marks=() if name == DIGITS else pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize(("method", "rank"), [(DIGITS, 0), *BAD])
def test_not_a_number_on_one_rank(method, rank, reports, folder):
    ended = reports[f"bad/{method}/{rank}"]
    assert [done.code for done in ended] == [2, 2]
    lines = [line for done in ended for line in done.err.splitlines() if "not finite" in line]
    assert len(lines) == 1
    for part in ("at step 5 of epoch 1", f"nan on rank {rank} in the batch of samples", "last good checkpoint"):
        assert part in lines[0]
    assert "Traceback" not in "".join(done.err for done in ended)
    run = folder / "bad" / method / str(rank)
    assert load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert all(torch.isfinite(v).all() for v in harness.weights(run).values())
    assert {path.name for path in (run / "checkpoints").glob("*.ckpt")} <= {"last.ckpt", "best.ckpt"}
