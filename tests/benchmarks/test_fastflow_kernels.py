"""The benchmark of FastFlow's coupling runs, and its figures of memory are those of known work."""

import json

import pytest
import torch

from penstock.benchmarks import fastflow_kernels
from penstock.benchmarks.fastflow_kernels import cases, main, peak, waiting
from penstock.kernels import coupling

CPU = torch.device("cpu")


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fastflow_kernels, "MAPS", ((8, 32), (6, 3)))
    monkeypatch.setattr(coupling, "SMALL", 0)
    main(["--rounds", "1", "--no-compile", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "fastflow_kernels_cpu.json").read_text())
    assert len(found["rows"]) == 8
    assert all(row["ours, ms"] > 0 and row["ours / memory limit"] > 0 for row in found["rows"])
    unit = 8 * 8 * 32 * 32 * 4 / 2**20
    for row in found["rows"][:4]:
        training = row["work"].startswith("training")
        assert (row["ours, waiting MiB"] is not None) == training
        if training:
            assert unit <= row["ours, waiting MiB"] < 1.01 * unit
            assert row["eager, waiting MiB"] >= 2 * unit
        assert unit <= row["ours, peak MiB"] < row["eager, peak MiB"] + unit
    assert (tmp_path / "fastflow_kernels_cpu.md").read_text().count("\n| ") == 10


def test_rivals_make_the_same():
    for case in cases(2, CPU):
        for ours, theirs in zip(case.work(*case.inputs), case.eager(*case.inputs)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_memory():
    x = torch.zeros(2**18)

    def work():
        y = x + 1
        z = y + 1
        del y
        return z + 1

    assert peak(work, CPU) == pytest.approx(2, rel=1e-3)
    (case, *_) = cases(1, CPU)
    assert waiting(case, lambda u, a, g, offset: (u * a, a.exp())) == 2 * case.inputs[1].nbytes / 2**20
