"""`penstock table`: its words, interruption, the SLURM array, W&B."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml
from lightning.pytorch.trainer.states import TrainerFn

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.conf import options
from penstock.lightning_modules.cli.run_facts import _split
from penstock.lightning_modules.cli.table import WORDS, run_table
from tests.table_stubs import Stub, own_table, report

GIVEN = ["small", "out=out", "weights=net.safetensors"]
own = pytest.fixture(own_table)


def test_alone_it_lists_the_tables(capsys):
    assert main(["table"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {*options("table")}


def test_help_is_short_and_names_every_word(capsys):
    assert main(["table", "--help"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 22
    for word in WORDS:
        assert f"{word}=" in out or f".{word.rpartition('.')[2]}" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["small", "teir=small"], ["table teir=small: unknown (did you mean 'tier'?)"]),
        (["small", "--dry-rum"], ["table --dry-rum: expected --dry-run", "did you mean '--dry-run'?"]),
        (["small", "other"], ["table: found small, other; expected one of"]),
        (["tier=smoke"], ["table: no name; expected one of", "small"]),
        (["small", "seed=x"], ["seed=x: expected int"]),
        (["small", "experiment=boss_digits"], ["table experiment=boss_digits: unknown"]),
        (["small", "logger=wandbb"], ["logger=wandbb: expected one of wandb, csv (did you mean 'wandb'?)"]),
        (["small", "logger.wandb.mode=offlin"], ["logger.wandb.mode=offlin:", "did you mean 'offline'?"]),
        (["small", "weights=net.safetensors", "slurm=none/a.sh"], ["slurm=none/a.sh: can't be written"]),
    ],
)
@pytest.mark.usefixtures("own")
def test_mistakes(words, parts, capsys):
    assert main(["table", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize("words", [[], ["--help"], ["fastflow_mvtek"], ["sepc_coco", "teir=x"]], ids=" ".join)
def test_answers_import_no_torch(words):
    code = (
        "import sys; from penstock.lightning_modules.cli import main; code = main(['table', *sys.argv[1:]]);"
        "assert not {'torch', 'lightning', 'wandb', 'hydra'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == (2 if words[:1] not in ([], ["--help"]) else 0), done.stderr


@pytest.mark.usefixtures("own")
def test_the_report_says_its_command_and_rows_get_words_and_variables(tmp_path):
    stub = Stub()
    assert run_table([*GIVEN, "trainer.max_epochs=3", "threads=1", f"data={tmp_path}"], stub) == 0
    assert all("trainer.max_epochs=3" in words for words in stub.asked)
    assert (stub.environment["OMP_NUM_THREADS"], stub.environment["PENSTOCK_DATA"]) == ("1", str(tmp_path))
    line = "penstock table small out=out weights=net.safetensors trainer.max_epochs=3 threads=1 data=."
    text, _, record = report(tmp_path)
    assert record["command"] == line
    assert f"`{line}`" in text


class Interrupted(Stub):
    """A run that Ctrl-C, or SIGTERM, reaches while it works."""

    def __call__(self, words, environment, log):
        if len(self.asked) == 1:
            os.kill(os.getpid(), self.signal)
            time.sleep(10)
        return super().__call__(words, environment, log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("own")
def test_a_signal_in_the_middle_and_the_same_command_again(number, tmp_path, capsys):
    stub = Interrupted()
    stub.signal = number
    assert run_table(GIVEN, stub) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert "1 of 3 runs finished" in report(tmp_path)[0]
    again = Stub([0.8, 0.7])
    assert run_table(GIVEN, again) == 0
    assert len(again.asked) == 2
    assert [row[1] for row in report(tmp_path)[1][2:5]] == ["0.900", "0.800", "0.700"]


def test_a_slurm_task_runs_one_row_once_and_goes_on(own, tmp_path, monkeypatch, capsys):
    own()
    assert run_table([*GIVEN, "slurm=array.sh"], Stub()) == 0
    assert "array.sh, 3 tasks; sbatch array.sh" in capsys.readouterr().out
    assert subprocess.run(["bash", "-n", "array.sh"], check=False).returncode == 0
    text = (tmp_path / "array.sh").read_text()
    assert "#SBATCH --array=1-3" in text
    assert (tmp_path / "out" / "slurm").is_dir()
    program = tmp_path / "bin" / "penstock"
    program.parent.mkdir()
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > words\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(["bash", tmp_path / "array.sh"], env=environment, cwd="/", check=True)
    verb, *words = (tmp_path / "words").read_text().splitlines()
    assert (verb, words) == ("table", [*GIVEN, "run=2"])
    monkeypatch.setenv("SLURM_NTASKS", "1")
    stopped = Stub(stop_at=1)
    assert run_table(words, stopped) == 130
    assert "data.normal=3" in stopped.asked[0]
    assert not any(name.startswith("SLURM_") for name in os.environ), "Lightning would take them for its launcher"
    stub = Stub([0.8])
    assert run_table(words, stub) == 0
    (on,) = stub.asked
    assert on[1].startswith("ckpt_path=")
    idle = Stub()
    assert run_table(words, idle) == 0
    assert idle.asked == []
    assert not (tmp_path / "out" / "small_smoke.md").exists(), "tasks that end together write no report"
    rest = Stub([0.9, 0.7])
    assert run_table(GIVEN, rest) == 0
    assert len(rest.asked) == 2


@pytest.mark.usefixtures("own")
def test_the_report_goes_to_wandb_offline_as_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = {}

    class Run:
        url, dir = None, str(tmp_path / "out" / "wandb" / "offline-run" / "files")

        def log(self, parts):
            logged.update(parts)

        def finish(self):
            logged["finished"] = True

    def init(**options):
        logged["options"] = options
        return Run()

    monkeypatch.setattr("wandb.init", init)
    assert run_table([*GIVEN, "logger.wandb.project=papers"], Stub()) == 0
    options, table = logged["options"], logged["table/numbers"]
    assert (options["job_type"], options["project"], options["mode"]) == ("table", "papers", "offline")
    assert (options["group"], options["tags"]) == ("small", ["smoke"])
    assert table.columns[:4] == ["row", "column", "image_auroc", "aupro"]
    assert [row[:4] for row in table.data] == [
        ["file", "ours", 0.9, None],
        ["3", "ours", 0.8, None],
        ["4", "ours", 0.7, None],
    ]
    assert {"global batch", "NFE", "EMA", "split", "commit"} <= {*table.columns}
    assert ["others", "image_auroc", "3", 0.75, "arXiv 0000.00000", "recalled"] in logged["table/references"].data
    assert logged["finished"]
    assert "W&B: offline; wandb sync" in capsys.readouterr().out


@pytest.mark.usefixtures("own")
def test_without_wandb_nothing_is_lost(tmp_path, monkeypatch, capsys):
    def init(**_):
        raise OSError("no network")

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert run_table(GIVEN, Stub()) == 0
    out, err = capsys.readouterr()
    assert "W&B: OSError: no network" in err
    assert "W&B: not logged" in out
    assert "3 of 3 runs finished" in report(tmp_path)[0]
    assert run_table([*GIVEN, "logger=csv"], Stub()) == 0
    assert "W&B" not in capsys.readouterr().out


def test_a_run_leaves_what_its_configuration_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    words = ["experiment=rectified_flow_points", "logger=csv", "callbacks.samples=null", "trainer.accelerator=cpu"]
    assert main(["fit", *words, "trainer.max_steps=1", "trainer.accumulate_grad_batches=2"]) == 0
    known = json.loads((tmp_path / "facts.json").read_text())
    assert known == {"ranks": 1, "device": "cpu", "accumulation": 2, "batch": 2048, "split": "test"}


@pytest.mark.parametrize(
    ("verb", "numbers", "split"),
    [
        (TrainerFn.TESTING, {"val": [1], "test": [2]}, "test"),
        (TrainerFn.TESTING, {"val": [1], "test": []}, "val"),
        (TrainerFn.TESTING, None, "test"),
        (TrainerFn.VALIDATING, {"val": [1]}, "val"),
        (TrainerFn.FITTING, {"val": [1]}, None),
    ],
)
def test_the_split_that_is_scored(verb, numbers, split):
    assert _split(verb, numbers) == split


REAL = """\
# real runs
title: Real
metrics: [fd_points/4]
tiers:
  smoke:
    note: Seconds.
    mean: false
    runs:
      - {row: fit, column: ours, words: &words [experiment=tiny]}
      - {row: test, column: ours, verb: test, checkpoint: tiny, words: *words}
references: []
"""
TINY = """\
# @package _global_
defaults:
  - override /net: mlp
  - override /data: points
trainer: {max_epochs: -1, max_steps: 2, accumulate_grad_batches: 2}
callbacks:
  metrics:
    n: 50
    steps: [4]
    metrics:
      - class_path: penstock.lightning_modules.callbacks.frechet.FrechetDistance
        features: {class_path: penstock.lightning_modules.callbacks.features.Points}
  samples: null
"""


@pytest.mark.slow
def test_real_runs_a_fit_and_a_test_of_a_training(tmp_path, monkeypatch):
    for group, name, text in (("table", "real", REAL), ("experiment", "tiny", TINY)):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(text)
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path / "conf"))
    monkeypatch.chdir(tmp_path)
    assert main(["table", "real", "out=out", "logger=csv"]) == 0
    fitted, tested = json.loads((tmp_path / "out" / "real_smoke.json").read_text())["rows"]
    assert (fitted["ranks"], fitted["accumulation"]) == (1, 2)
    assert fitted["global_batch"] == 2 * fitted["batch"]
    assert fitted["nfe"] == tested["nfe"] == {"fd_points/4": 4}
    assert (tested["verb"], tested["global_batch"], tested["ranks"]) == ("test", None, 1)
    assert (fitted["features"], fitted["ema"]) == (tested["features"], tested["ema"]) == ("Points", 0.9999)
    assert fitted["metrics"]["fd_points/4"] == pytest.approx(tested["metrics"]["fd_points/4"], rel=1e-5)
    (teacher,) = (tmp_path / "runs" / "tiny").glob("*/checkpoints/last.ckpt")
    config = yaml.safe_load((tmp_path / "out" / "rows" / tested["key"] / "config.yaml").read_text())
    assert config["seed_everything"] == 0
    assert teacher.is_file()
