"""The comparison of fast flows: what is run, from what, and what is written; no statement about quality."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from penstock.benchmarks import fast_flows
from penstock.benchmarks.fast_flows import Stage

TINY = ["trainer.max_epochs=-1", "trainer.max_steps=2", "model.net.width=8", "callbacks.samples=null"]
TINY += ["reflow:data.n=150", "reflow:callbacks.straightness=null", "boss:data.n=150", "boss:data.steps=8"]


def test_stages_of_several_networks_come_last():
    found = [stage.name for stage in fast_flows.stages(["distill", "reflow"], [0, 1], [1, 4])]
    assert found == ["reflow_seed0", "reflow_seed1", *(f"distill_{k}_seed{seed}" for k in (1, 4) for seed in (0, 1))]


def test_what_a_stage_trains_for_and_is_scored_at():
    assert Stage("boss", 0, 4).words() == ["model.k=4"]
    assert Stage("distill", 0, 1).words() == []
    assert Stage("distill", 0, 4).words()[-1] == "model.times.k=4"
    assert Stage("boss", 0, 4).steps([1, 4]) == ["4"]
    assert Stage("reflow", 0).steps([1, 4]) == ["1", "4"]
    assert Stage("rectified_flow", 0).steps([1, 4]) == ["1", "4", "bellman:4"]


def test_words_of_one_method():
    words = ["data.keep=bellman:4", "reflow:model.lr=1e-4", "boss:trainer.max_steps=3"]
    assert list(fast_flows.own(words, "reflow")) == ["data.keep=bellman:4", "model.lr=1e-4"]


def test_spread():
    assert fast_flows.spread([]) is None
    assert fast_flows.spread([2.0]) == "2"
    assert fast_flows.spread([1.0, 3.0]) == "2 ± 1.4"


def test_rows_are_means_of_runs_and_bellman_steps_have_their_own(tmp_path):
    values = {
        "rectified_flow_seed0": {"fd_pixels/1": 9.0, "fd_pixels/2": 5.0, "fd_pixels/bellman-2": 4.0},
        "rectified_flow_seed1": {"fd_pixels/1": 7.0, "fd_pixels/2": 3.0, "fd_pixels/bellman-2": 2.0},
        "boss_1_seed0": {"fd_pixels/1": 3.0},
        "boss_2_seed0": {"fd_pixels/2": 1.0},
    }
    for name, scored in values.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores_9.json").write_text(json.dumps(scored))
        (tmp_path / name / "metrics.json").write_text('{"train_seconds": 2.0}')
        (tmp_path / name / "metrics.csv").write_text("step,train_seconds\n7,2.0\n")
    lab = fast_flows.Laboratory(Namespace(work=tmp_path, n=9, device="cpu", seeds=[0, 1], nfe=[1, 2]))
    _, rows, drawn = fast_flows.tables(lab, ["reflow", "boss"])
    teacher, searched, boss = rows
    assert (teacher["fd_pixels/1"], teacher["seeds"], teacher["steps"]) == ("8 ± 1.4", 2, 7)
    assert (searched["fd_pixels/1"], searched["fd_pixels/2"], searched["steps"]) == (None, "3 ± 1.4", 0)
    assert (boss["fd_pixels/1"], boss["fd_pixels/2"], boss["seeds"]) == ("3", "1", 1)
    assert drawn[2]["metrics"] == {"fd_pixels/1": 3.0, "fd_pixels/2": 1.0}


@pytest.mark.slow
def test_runs_are_kept_and_share_their_pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    work, out = tmp_path / "work", tmp_path / "out"
    words = ["--suffix", "digits", "--methods", "reflow", "rectified_flow_pp", "boss", "--nfe", "1", "2", "--n", "20"]
    words += ["--work", str(work), "--out", str(out), "--threads", "1"]
    words += [f"--word={word}" for word in TINY]
    words += [f"--word={word.replace('reflow', 'rectified_flow_pp')}" for word in TINY if word.startswith("reflow:")]
    fast_flows.main(words)
    found = json.loads((out / "fast_flows_cpu.json").read_text())
    assert [row["steps"] for row in found["rows"]] == [2, 0, 2, 2, 2]
    assert {"fd_pixels/1", "fd_pixels/2", "train_seconds"} <= found["runs"]["reflow_seed0"].keys()
    assert set(found["runs"]) == {p.name for p in work.iterdir()}
    assert len(list((work / "rectified_flow_seed0" / "pairs").glob("*/pairs.json"))) == 3
    assert (out / "fast_flows_cpu.png").stat().st_size < 150_000
    monkeypatch.setattr(fast_flows, "process", None)
    before = {path: path.stat().st_mtime for path in Path(work).rglob("*.ckpt")}
    fast_flows.main(words)
    assert before == {path: path.stat().st_mtime for path in Path(work).rglob("*.ckpt")}
