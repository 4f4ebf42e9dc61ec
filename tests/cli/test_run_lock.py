"""Two processes never train in one run folder."""

import subprocess
import sys

import pytest

from penstock.lightning_modules.cli import main, teacher
from penstock.lightning_modules.cli.run_lock import claim, claimed, release
from penstock.lightning_modules.errors import UserError

HOLD = (
    "import sys; from pathlib import Path; from penstock.lightning_modules.cli.run_lock import claim;"
    "claim(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)
TINY = ["experiment=rectified_flow_digits", "logger=csv", "model.net.width=8", "model.net.blocks=1"]
TINY += ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_test_batches=1"]
TINY += ["callbacks.metrics=null", "callbacks.samples=null", "trainer.accelerator=cpu"]


@pytest.fixture
def hold():
    """Lets another process train in a folder; ends with the test or by `kill`."""
    processes = []

    def start(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_claim_ends_with_its_process(hold, tmp_path):
    assert not claimed(tmp_path)
    process = hold(tmp_path)
    assert claimed(tmp_path)
    with pytest.raises(UserError, match="another process trains in it"):
        claim(tmp_path)
    process.kill()
    process.wait()
    assert not claimed(tmp_path)
    claim(tmp_path)
    release()


def test_fit_refuses_the_folder_of_another_process(hold, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setenv("RUN_DIR", str(run))
    assert main(["fit", *TINY]) == 0
    assert not claimed(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    hold(run)
    assert main(["fit", f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_epochs=2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penstock:")]
    assert line.startswith(f"penstock: run folder '{run}': another process trains in it")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_teacher_in_training_is_waited_for(hold, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "runs" / "rectified_flow_digits" / "a" / teacher.LAST
    last.parent.mkdir(parents=True)
    process, waited = hold(last.parents[1]), []

    def wait(run):
        waited.append(run)
        process.kill()
        process.wait()
        last.touch()

    monkeypatch.setattr(teacher, "_same", lambda run, wanted: True)
    monkeypatch.setattr(teacher, "_finished", lambda run: (run / teacher.LAST).is_file())
    monkeypatch.setattr(teacher, "wait_until_free", wait)
    assert teacher.find_or_train("rectified_flow_digits") == str(last)
    assert [run.name for run in waited] == ["a"]
    assert "waits for the process that trains" in capsys.readouterr().err
