"""The tables of BOSS from tiny runs: what is run, what is written, what is not run again."""

import json
import os

import pytest

from penstock.benchmarks import boss, launch
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.compose import compose

TINY = ["model.net.width=8", "model.net.blocks=1", "callbacks.metrics.n=20"]
SHORT = ["data.n=40", "data.pairs_batch=20", "data.shard=20", "data.batch_size=8", "trainer.max_steps=3"]
SHORT += ["trainer.max_epochs=-1", "trainer.limit_val_batches=0", "callbacks.samples=null"]


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    own = ["--teacher", str(tmp_path / "teacher"), "--k-max", "6", "--lengths", "2", "--seeds", "0", "--threads", "1"]
    return [*own, "--out", str(tmp_path / "out"), *(f"--word={w}" for w in TINY), *(f"--tune-word={w}" for w in SHORT)]


@pytest.fixture
def started(monkeypatch):
    """Runs what would be processes in this one; the words of each are kept."""
    asked = []

    def process(command, more, threads=None, log=None):
        asked.append(command[3:])
        for key, value in more.items():
            os.environ[key] = value
        assert main(command[3:]) == 0

    monkeypatch.setenv("RUN_DIR", "")
    for place in (boss, launch):
        monkeypatch.setattr(place, "process", process)
    return asked


def result(tmp_path, part):
    return json.loads((tmp_path / "out" / f"boss_digits_cpu_{part}.json").read_text())


def test_tables_of_digits(words, tmp_path, started):
    runs, one = tmp_path / "runs", ["trainer.max_steps=1", "trainer.limit_val_batches=0", "callbacks.samples=null"]
    launch.fit(["experiment=rectified_flow_digits", *TINY, *one, "trainer.limit_test_batches=1"], tmp_path / "teacher")
    tune = ["--tune", "3", "--runs", str(runs)]
    boss.main([*words, *tune])
    (row,) = result(tmp_path, "steps")["rows"]
    assert (row["calls"], row["seeds"]) == (2, 1)
    assert row["Bellman / equal"] > 0
    rows = result(tmp_path, "tune")["rows"]
    assert [r["fine-tune"] for r in rows] == ["none, equal steps", "none, Bellman steps", *boss.METHODS]
    for r in rows[2:]:
        assert (r["calls"], r["seeds"], r["updates"], r["batch"], r["pairs"]) == (3, 1, 3, 8, 40)
        assert r["against untuned Bellman steps"] > 0
    assert len(list((tmp_path / "teacher" / "pairs").glob("*/pairs.json"))) == 1
    names = {f"{method}_3_0" for method in boss.METHODS} | {"steps_0"}
    assert {p.name for p in runs.iterdir()} == names
    (tmp_path / "out" / "boss_digits_cpu_tune.json").unlink()
    assert [words[0] for words in started] == ["fit", "test", "fit", "fit", "fit"]
    boss.main([*words, *tune])
    assert len(started) == 5
    assert result(tmp_path, "tune")["rows"] == rows


@pytest.mark.slow
def test_a_run_that_fails_is_told(words, tmp_path):
    (tmp_path / "teacher/checkpoints").mkdir(parents=True)
    (tmp_path / "teacher/checkpoints/last.ckpt").touch()
    with pytest.raises(RuntimeError, match=r"net\.widht"):
        boss.main([*words, "--parts", "steps", "--word=model.net.widht=8"])


def test_rows_over_seeds():
    runs = [{"fd/4": 1.0, "fd/bellman-4": 0.5}, {"fd/4": 3.0, "fd/bellman-4": 3.5}]
    row = boss.steps_row("fd", 4, runs)
    assert (row["fd, equal steps"], row["Bellman steps"]) == ("2 ± 1.4", "2 ± 2.1")
    assert (row["Bellman / equal"], row["seeds"], row["seeds in which Bellman is no worse"]) == (1.0, 2, 1)
    tuned = [{"fd/4": v, "updates": 10, "batch": 8, "pairs": 40, "train_seconds": 60.0} for v in (0.5, 1.5)]
    row = boss.tune_row("fd", 4, "BOSS", tuned, untuned=2.0)
    assert (row["fd"], row["against untuned Bellman steps"], row["updates"]) == ("1 ± 0.71", 0.5, 10)
    assert boss.spread([0.25]) == "0.25"


@pytest.mark.parametrize("suffix", ["digits", "cifar10"])
def test_baselines_have_the_pairs_and_the_budget_of_boss(suffix):
    own, *others = (compose([f"experiment=boss_{suffix}{end}"])[0] for end in boss.METHODS.values())
    for other in others:
        assert {k: v for k, v in other.items() if k not in ("model", "objective")} == {
            k: v for k, v in own.items() if k not in ("model", "objective")
        }
        recipe = ("optimizer", "scheduler", "net", "initial")
        assert [other["model"]["init_args"][k] for k in recipe] == [own["model"]["init_args"][k] for k in recipe]
