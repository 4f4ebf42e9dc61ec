"""The toys of STARFlow run with tiny settings and write their two files; no statement about what is reached."""

import json

import pytest
import torch

from penstock.benchmarks import starflow_toys


@pytest.fixture(autouse=True)
def threads():
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)


def test_every_part_leaves_its_rows(tmp_path):
    assert starflow_toys.main(["--share", "0.001", "--n", "200", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "starflow_toys.json").read_text())
    assert [row["part"] for row in found["rows"]] == (
        ["mixture"] * 4 + ["gaussian"] * 2 + ["clips, sigma 0.5"] * 6 + ["clips, sigma 0.3"] * 6
    )
    assert all(float(row["found"]) > 0 and float(row["standard error"]) > 0 for row in found["rows"])
    assert found["steps"]["clips"] == 2
    assert set(found["seconds"]) == set(starflow_toys.PARTS)
    assert (tmp_path / "starflow_toys.md").read_text().count("\n| ") == 20
