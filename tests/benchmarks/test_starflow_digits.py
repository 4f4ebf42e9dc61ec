"""STARFlow beside an equal split and Gaussians: tiny flows train, the table is written; nothing on what is reached."""

import json

import pytest
import torch

from penstock.benchmarks import starflow_digits
from penstock.lightning_modules.cli import _run

TINY = ["trainer.max_steps=1", "model.net.dim=32", "callbacks.metrics.n=20"]
TINY += ["callbacks.samples=null", "callbacks.likelihood.n=20", "trainer.accelerator=cpu"]


def test_both_splits_and_the_gaussians_leave_their_rows(tmp_path, monkeypatch):
    ran = {}

    def fit(words, run, threads):
        monkeypatch.setenv("RUN_DIR", str(run))
        ran[run.name] = words
        assert _run(["fit", "logger=csv", *words]) == 0

    monkeypatch.setattr(starflow_digits, "kept", fit)
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    words = [f"--word={word}" for word in TINY]
    words += ["--seeds", "3", "--threads", "1", "--work", str(tmp_path), "--out", str(tmp_path)]
    assert starflow_digits.main(words) == 0
    torch.set_num_threads(threads)
    assert set(ran) == {"deep_shallow_seed3", "equal_seed3"}
    assert set(ran["equal_seed3"]) - set(ran["deep_shallow_seed3"]) == {"model.net.depths=[2,2,2,2]"}
    found = json.loads((tmp_path / "starflow_digits.json").read_text())
    flow, equal, full, classes = found["rows"]
    assert flow["parameters"] == equal["parameters"] > 0
    assert float(equal["more than the first, by seed"]) == pytest.approx(
        float(equal["bits a dimension"]) - float(flow["bits a dimension"]), abs=2e-3
    )
    assert {"fd_pixels/64", "label_accuracy/64"} <= flow.keys()
    assert full["bits a dimension"] == "2.941"
    assert float(classes["bits a dimension"]) < 2.6


def test_layers_are_shared_out():
    assert starflow_digits.shared_out([1, 1, 1, 5]) == [2, 2, 2, 2]
    assert starflow_digits.shared_out([1, 1, 6]) == [3, 3, 2]


def test_spread_says_the_deviation_of_several():
    assert starflow_digits.spread([2.0]) == "2.000"
    assert starflow_digits.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
