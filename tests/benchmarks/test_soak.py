"""A run of two ranks, killed twice: the report says that its bits are those of one left alone, or which are not."""

import json

import pytest

from penstock.benchmarks import soak

WORDS = ["experiment=rectified_flow_points", "data.size=400", "data.batch_size=100", "model.net.width=16"]
WORDS += ["callbacks.samples=null", "trainer.enable_model_summary=false", "trainer.limit_test_batches=1"]


def test_words_without_an_experiment(capsys):
    with pytest.raises(SystemExit):
        soak.main(["trainer.max_epochs=1"])
    assert "expected experiment=NAME" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    assert soak.main([*WORDS, "trainer.max_epochs=40", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "soak_rectified_flow_points.json").read_text())
    assert (found["differing"], found["same_metrics"], found["steps"]) == ([], True, 160)
    assert [row["kill"] for row in found["rows"]] == [1, 2]


@pytest.mark.slow
def test_a_run_that_ends_before_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "AT_START", 0)
    monkeypatch.setattr(soak.random.Random, "uniform", lambda *_: 300)
    with pytest.raises(RuntimeError, match="the run ended after 0 kills; give it more steps"):
        soak.main([*WORDS, "trainer.max_epochs=1", "--rounds", "1", "--out", str(tmp_path)])
