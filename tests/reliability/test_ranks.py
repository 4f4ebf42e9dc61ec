"""Two gloo ranks under DDP: resumed as never stopped, the same numbers as one rank, one line when one goes wrong."""

import json

import harness
import pytest
import torch
from methods import METHODS, words

from penstock.lightning_modules.checkpoints import load_checkpoint

TWO = ["strategy=ddp", "trainer.devices=2"]
CUTS = [(method, "step3") for method in METHODS]
CUTS += [(method, "epoch4") for method in ("rectified_flow_digits", "rectified_flow_ot")]
QUICK = ("rectified_flow_digits", "reflow_digits", "boss_digits")
PLAIN = ["model.net.dropout=0", "data.eval_batch_size=18", "trainer.limit_val_batches=null"]
PLAIN += ["data.val_fraction=0.0606", "data.batch_size=24", "trainer.limit_train_batches=4"]


def method_words(method, *more):
    return [*words(method), *TWO, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def reports(request, folder):
    """How the jobs of all tests that are run ended, by name: [of rank 0, of rank 1]; one pair of processes for them."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    pairs = [(test.callspec.params.get("method"), test.callspec.params.get("cut")) for test in tests]
    methods = [method for method in METHODS if method == "rectified_flow_digits" or method in dict(pairs)]
    jobs = {}

    def job(name, *all_words):
        jobs[name] = {"words": list(all_words), "run": str(folder / name)}

    for method in methods:
        cuts = f"+callbacks.cuts={{class_path: faults.Cuts, out: '{folder / 'cuts' / method}'}}"
        job(method, *method_words(method, cuts))
    for method, cut in (pair for pair in CUTS if pair in pairs):
        job(f"cuts/{method}/{cut}", harness.last_checkpoint(folder / "cuts" / method / cut))
    digits = "rectified_flow_digits"
    job("two_workers", *method_words(digits, "data.num_workers=2"))
    job("plain2", *method_words(digits, *PLAIN))
    masks = f"+callbacks.masks={{class_path: faults.DropoutMasks, out: '{folder / 'masks'}'}}"
    job("masks", *method_words(digits, masks))
    job("odd", *method_words(digits, "data.batch_size=21"))
    for rank in (0, 1):
        bad = f"+callbacks.bad={{class_path: faults.BadLoss, step: 5, rank: {rank}}}"
        job(f"bad{rank}", *method_words(digits, bad))
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
    harness.same_state(folder / "two_workers", folder / "rectified_flow_digits")


def test_two_ranks_train_and_validate_as_one(reports, folder, tmp_path):
    """24 samples a step on one rank or 12 on each of two; 109 validation samples in batches of 18, the last of 1."""
    assert harness.penstock("fit", *words("rectified_flow_digits"), *PLAIN, run=tmp_path).code == 0
    one, two = harness.metrics(tmp_path), harness.metrics(folder / "plain2")
    for step in (3, 7):
        assert float(two[step]["val/loss"]) == pytest.approx(float(one[step]["val/loss"]), abs=1e-6)
    found, expected = (
        load_checkpoint(run / "checkpoints" / "last.ckpt")["current_model_state"]
        for run in (folder / "plain2", tmp_path)
    )
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


@pytest.mark.parametrize("rank", [0, 1])
def test_not_a_number_on_one_rank(rank, reports, folder):
    ended = reports[f"bad{rank}"]
    assert [done.code for done in ended] == [2, 2]
    lines = [line for done in ended for line in done.err.splitlines() if "not finite" in line]
    assert len(lines) == 1
    for part in ("at step 5 of epoch 1", f"nan on rank {rank} in the batch of samples", "last good checkpoint"):
        assert part in lines[0]
    assert "Traceback" not in "".join(done.err for done in ended)
    run = folder / f"bad{rank}"
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 5
    assert all(torch.isfinite(v).all() for v in checkpoint["current_model_state"].values())
    assert [path.name for path in (run / "checkpoints").glob("*.ckpt")] == ["last.ckpt"]
