"""The benchmark of STARFlow's kernels runs, and its rivals make the same."""

import json

import torch

from penstock.benchmarks import starflow_kernels
from penstock.benchmarks.starflow_kernels import Sizes, cases, main, rotated_on_read
from penstock.kernels.rotary import reference

TINY = Sizes(2, 2, 16, 2, 6, 3, 4, 3)


def test_files(tmp_path, monkeypatch):
    monkeypatch.setitem(starflow_kernels.SIZES, "cpu", TINY)
    main(["--rounds", "1", "--no-compile", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "starflow_kernels_cpu.json").read_text())
    assert len(found["rows"]) == 4
    assert {row["ours is"] for row in found["rows"]} == {"the reference"}
    assert all(row["ours / memory limit"] > 0 for row in found["rows"])
    assert found["rows"][3]["as published, ms"] > 0
    assert (tmp_path / "starflow_kernels_cpu.md").read_text().count("\n| ") == 6


def test_rotation_on_reading_and_on_writing_are_the_same():
    torch.manual_seed(0)
    (case,) = (case for case in cases(TINY, torch.device("cpu"), torch.float32) if case.published)
    query, key, value, keys, values = case.inputs
    options = case.work.keywords
    raw = reference(keys, options["cos"], options["sin"], back=True)
    published = rotated_on_read(query, key, value, raw, values.clone(), **options)
    torch.testing.assert_close(case.work(*case.inputs), published, rtol=1e-4, atol=1e-5)
