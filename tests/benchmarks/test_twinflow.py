"""The TwinFlow benchmark: a step's calls are counted and timed, recipes are trained, scored and kept."""

import json

import pytest

from penstock.benchmarks import twinflow


def test_cost_of_a_step(tmp_path):
    words = ["--parts", "cost", "--batch", "8", "--width", "4", "--rounds", "1", "--threads", "1"]
    assert twinflow.main([*words, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "twinflow_cost_cpu.json").read_text())["rows"]
    assert [row["calls a sample with gradient"] for row in rows] == [1] * 7
    assert [row["without"] for row in rows] == [0, 1, 2, 1.75, 2.25, 3.25, 4]
    assert all(row["ms"] > 0 and row["peak memory, MiB"] > 0 for row in rows)


@pytest.mark.slow
def test_recipes(tmp_path, make_teacher):
    tiny = ["model.net.width=8", "model.net.blocks=1", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    tiny += ["callbacks.metrics.n=20", "callbacks.samples=null", "trainer.accelerator=cpu"]
    tiny += ["callbacks.checkpoint.every_n_epochs=1"]
    words = [f"--word={word}" for word in tiny] + ["--teacher", str(make_teacher()), "--threads", "1"]
    words += ["--seeds", "0", "1", "--recipes", "rcgm", "twinflow", "tuned", "--once", "twinflow", "tuned"]
    for _ in range(2):
        twinflow.main(["--parts", "recipes", "--work", str(tmp_path / "work"), "--out", str(tmp_path), *words])
    rows = json.loads((tmp_path / "twinflow_digits.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [2, 1, 1]
    assert "±" in rows[0]["fd_pixels/1"]
    assert all({"fd_pixels/1", "fd_pixels/4", "label_accuracy/1"} <= row.keys() for row in rows)
    assert (tmp_path / "twinflow_digits.png").stat().st_size > 1000
