"""The benchmark of small pyramids."""

import json

from penstock.benchmarks.piip_toys import SIZES, main


def test_all_networks_are_timed_and_the_inverted_pyramid_has_fewer_operations(tmp_path):
    assert main(["--rounds", "1", "--batch", "2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "piip_toys_cpu.json").read_text())["rows"]
    assert {row["data"] for row in rows} == SIZES.keys()
    for data in SIZES:
        found = {row["network"]: row for row in rows if row["data"] == data}
        assert found["inverted"]["step over inverted"] == 1
        order = ["inverted, no interactions", "inverted", "equal branches", "reversed"]
        operations = [found[name]["GFLOP"] for name in order]
        assert operations == sorted(operations)
        assert all(row["one image, ms"] > 0 and row["step, ms"] > 0 for row in found.values())
