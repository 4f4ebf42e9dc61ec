"""Costs of pyramids by resolution: the numbers of the paper's own comparison, and the files."""

import json

import pytest
from PIL import Image

from penstock.benchmarks import piip_costs


def test_costs_of_the_papers_pyramid():
    """Inverted, with the largest model everywhere, and reversed: 241, 1021 and 626."""
    found = piip_costs.costs(1120)
    assert {k: round(v) for k, v in found.items()} == {"inverted": 241, "equal": 1021, "reversed": 626, "B alone": 437}


def test_files(tmp_path):
    piip_costs.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "piip_costs.json").read_text())["rows"]
    assert all(row["inverted"] < row["B alone"] < row["reversed"] < row["equal"] for row in rows)
    assert rows[-1]["inverted"] == pytest.approx(rows[0]["inverted"] * (1760 / 320) ** 2, rel=0.01)
    assert Image.open(tmp_path / "piip_costs.png").width > 500
