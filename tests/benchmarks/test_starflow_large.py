"""The benchmark of a large flow runs at a tiny size; no statement about speed."""

import json
from types import SimpleNamespace

import pytest
import torch

from penstock.benchmarks import starflow_large
from penstock.benchmarks.official_starflow import released
from penstock.lightning_modules.errors import UserError

TINY = ["--dtype", "float32", "--shape", "2", "3", "2", "4", "--dim", "32", "--deep-dim", "64", "--depths", "1", "2"]
TINY += ["--text", "2", "--chunk", "3", "--windows", "4", "16", "--tolerance", "1e-9"]


@pytest.fixture(autouse=True)
def heads(monkeypatch):
    make = starflow_large.STARFlow
    monkeypatch.setattr(starflow_large, "TEXT_DIM", 8)
    monkeypatch.setattr(starflow_large, "STARFlow", lambda *args, **options: make(*args, **options, head_dim=32))


@pytest.mark.parametrize("guidance", ["0", "1.5"])
def test_all_samplers_make_the_same_clips(tmp_path, guidance):
    assert starflow_large.main([*TINY, "--guidance", guidance, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "starflow_large_cpu_float32.json").read_text())
    rows = {row["sampler"]: row for row in found["rows"]}
    assert list(rows) == ["token by token", "chunks of 3 and 12", "a window of 4", "a window of 16"]
    assert rows["token by token"]["calls"] == 2 * 8 + 8
    assert all(row["calls"] <= 24 and float(row["rms difference"]) < 1e-3 for row in rows.values())
    assert all(row["tokens/s"] * row["seconds"] == pytest.approx(16) for row in rows.values())
    assert found["parameters"] > 1e4


def test_outputs_have_the_strength_that_was_asked_for():
    torch.manual_seed(0)
    net = starflow_large.network((2, 3, 4, 4), 64, 128, (1, 2), 0.5)
    raw = []
    net.blocks[-1].proj_out.register_forward_hook(lambda *call: raw.append(call[-1]))
    net(torch.randn(4, 2, 3, 4, 4), torch.randn(4, 2, 8))
    assert 0.3 < float(raw[0].std()) < 0.7


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(UserError, match=r"no transformer_flow\.py there, expected a checkout of apple/ml-starflow"):
        released(tmp_path, SimpleNamespace(), 1)


def test_a_package_that_the_checkout_needs(tmp_path):
    (tmp_path / "transformer_flow.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match=r"it needs the package no_such_package"):
        released(tmp_path, SimpleNamespace(), 1)
