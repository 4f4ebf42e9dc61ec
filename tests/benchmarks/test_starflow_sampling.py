"""The benchmark of sampling runs on a tiny checkpoint and writes its two files; no statement about speed."""

import json

import torch

from penstock.benchmarks import starflow_sampling
from penstock.lightning_modules.cli import _run

TINY = ["experiment=starflow_v_moving_digits", "trainer.max_steps=1", "data.n_train=32", "data.n_test=4", "frames=3"]
TINY += ["model.net.dim=32", "model.net.deep_dim=32", "model.net.depths=[1,1]", "model.denoiser.dim=32", "logger=csv"]
TINY += ["callbacks=base", "callbacks.metrics=null", "callbacks.bits=null", "callbacks.curve=null"]
TINY += ["callbacks.samples=null", "callbacks.anomaly=null", "callbacks.ema=null", "trainer.accelerator=cpu"]


def test_every_way_makes_the_same_clips_in_no_more_calls(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    assert _run(["fit", *TINY]) == 0
    threads = torch.get_num_threads()
    words = [str(tmp_path / "run" / "checkpoints" / "last.ckpt"), "--n", "2", "--out", str(tmp_path)]
    assert starflow_sampling.main(words) == 0
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "starflow_sampling.json").read_text())["rows"]
    assert len(rows) == 10
    assert rows[0]["calls"] == 3 * 16 + 16
    assert all(row["calls"] <= rows[0]["calls"] for row in rows)
    assert all(float(row["largest difference"]) < 1e-3 for row in rows)
