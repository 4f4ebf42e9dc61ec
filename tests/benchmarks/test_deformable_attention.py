"""The benchmark of deformable attention runs; what it hands to official operators; why there is none."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from penstock.benchmarks import deformable_attention as benchmark
from penstock.benchmarks.deformable_attention import cases, main
from penstock.kernels.deformable_attention import _deformable_attention, deformable_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "BRANCHES", (("T", 32, 6), ("S", 64, 4), ("B", 96, 3)))


class Op:
    """An official operator, in PyTorch."""

    @staticmethod
    def apply(value, shapes, starts, locations, weights, step):
        assert (starts.tolist(), step) == ([0], 64)
        return deformable_attention(value, shapes.tolist(), locations, weights)


def test_files(tmp_path):
    main(["--rounds", "1", "--no-compile", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "deformable_attention_cpu.json").read_text())
    assert [row["work"] for row in found["rows"][:3]] == [
        "training, T 6 x 6 of S 4 x 4, d 1",
        "inference, T 6 x 6 of S 4 x 4, d 1",
        "training, S 4 x 4 of T 6 x 6, d 2",
    ]
    assert len(found["rows"]) == 8
    for row in found["rows"]:
        assert row["ours, ms"] > 0
        assert row["ours / memory limit"] > 0
        assert row["ours, peak MiB"] > 0
        assert (row["ours is"], row["official op is"]) == ("the reference", "none: for CUDA only")
        assert row["official op, ms"] is row["official op, peak MiB"] is row["official op, waiting MiB"] is None
        assert (row["ours, waiting MiB"] is None) == row["work"].startswith("inference")
    assert (tmp_path / "deformable_attention_cpu.md").read_text().count("\n| ") == 10


def test_official_operator_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "official", lambda device: (Op.apply, "a stand-in"))
    main(["--rounds", "1", "--no-compile", "--out", str(tmp_path)])
    for row in json.loads((tmp_path / "deformable_attention_cpu.json").read_text())["rows"]:
        assert row["official op is"] == "a stand-in"
        assert row["official op, ms"] > 0
        assert row["official op, peak MiB"] > 0


def test_rivals_make_the_same_and_bytes_are_those_of_the_tensors():
    for case in cases(CPU, Op.apply):
        ours = case.work(*case.inputs)
        for rival in (case.eager, case.published):
            torch.testing.assert_close(rival(*case.inputs), ours)
        once = sum(x.nbytes for x in case.inputs) + ours.nbytes
        assert case.nbytes == (3 * once - ours.nbytes if case.gradients else once)
        assert case.inputs[1].mean() == pytest.approx(0.5, abs=0.1)


def test_memory_that_waits():
    """The operator keeps its three inputs and nothing else."""
    case, *_ = cases(CPU)
    assert benchmark._waiting(case, lambda value, *_: value * value) == case.inputs[0].nbytes / 2**20

    def operator(*inputs):
        return _deformable_attention(inputs[0], [4, 4], *inputs[1:])

    assert benchmark._waiting(case, operator) == sum(x.nbytes for x in case.inputs) / 2**20
    assert benchmark._waiting(case, case.eager) > sum(x.nbytes for x in case.inputs) / 2**20


def test_where_official_operators_are_found(monkeypatch):
    assert benchmark.official(CPU) == (None, "none: for CUDA only")
    for name in ("mmcv", "mmcv.ops", "mmcv.ops.multi_scale_deform_attn", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    apply, origin = benchmark.official(CUDA)
    assert apply is None
    assert "mmcv: " in origin
    assert "kernels: " in origin
    monkeypatch.setattr(benchmark, "version", lambda package: "1.2")
    layers = SimpleNamespace(MultiScaleDeformableAttentionFunction=Op)
    hub = SimpleNamespace(get_kernel=lambda name, version: SimpleNamespace(layers=layers))
    monkeypatch.setitem(sys.modules, "kernels", hub)
    assert benchmark.official(CUDA) == (Op.apply, "kernels 1.2")
    for name in ("mmcv", "mmcv.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    mmcv = SimpleNamespace(MultiScaleDeformableAttnFunction=Op)
    monkeypatch.setitem(sys.modules, "mmcv.ops.multi_scale_deform_attn", mmcv)
    assert benchmark.official(CUDA) == (Op.apply, "mmcv 1.2")
