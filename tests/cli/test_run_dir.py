"""The word `run_dir=` says where a run goes."""

import pytest

from penstock.lightning_modules.cli import main, verbs

WORDS = ["experiment=rectified_flow_digits", "trainer.max_steps=1", "trainer.accelerator=cpu"]


@pytest.fixture
def asked(monkeypatch):
    """The run folders that runs would have; nothing is trained."""
    found = []
    monkeypatch.delenv("RUN_DIR", raising=False)
    monkeypatch.setattr(
        "penstock.lightning_modules.cli.lab.run_lab", lambda *a, **k: found.append(verbs.os.environ["RUN_DIR"])
    )
    return found


def test_the_word_names_the_folder(asked, tmp_path):
    verbs.run_verb("fit", [*WORDS, f"run_dir={tmp_path}/mine"])
    assert asked == [str(tmp_path / "mine")]


def test_the_environment_wins(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "theirs"))
    verbs.run_verb("fit", [*WORDS, f"run_dir={tmp_path}/mine"])
    assert asked == [str(tmp_path / "theirs")]


def test_a_sweep_refuses_it(capsys, tmp_path):
    assert main(["fit", "-m", *WORDS, "seed_everything=1,2", f"run_dir={tmp_path}/mine"]) == 2
    assert "run_dir: all jobs of a sweep" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
