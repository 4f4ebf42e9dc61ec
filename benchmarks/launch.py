"""`penstock fit` as a process of its own, in a folder that is thrown away or kept."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fitted(words: list[str], threads: int | None = None) -> Iterator[Path]:
    """Runs `penstock fit <words>` with the csv logger; yields the run folder, which is then deleted.

    Args:
        words: of the command line.
        threads: CPU threads of PyTorch; its own choice by default.

    Raises:
        RuntimeError: the run failed; its last lines are the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        fit(words, Path(folder), threads)
        yield Path(folder)


def kept(words: list[str], run: Path, threads: int | None = None) -> None:
    """`penstock fit <words>` in the folder `run`: nothing where it has finished, and it goes on where it was stopped.

    Raises:
        RuntimeError: the run failed; its last lines are the message.
    """
    metrics, last = run / "metrics.json", run / "checkpoints" / "last.ckpt"
    if metrics.is_file() and last.is_file() and "test/loss" in json.loads(metrics.read_text()):
        return
    run.mkdir(parents=True, exist_ok=True)
    fit([f"ckpt_path={last}"] if last.is_file() else ["logger=csv", *words], run, threads, log=run / "fit.log")


def fit(words: list[str], run: Path, threads: int | None = None, log: Path | None = None) -> None:
    """`penstock fit <words>` with the run folder `run`; with the csv logger unless a checkpoint says which.

    Raises:
        RuntimeError: the run failed; its last lines are the message.
    """
    logger = [] if any(word.startswith(("logger=", "ckpt_path=")) for word in words) else ["logger=csv"]
    command = [sys.executable, "-m", "penstock.lightning_modules", "fit", *logger, *words]
    process(command, {"RUN_DIR": str(run)}, threads, log)


def process(command: list[str], more: dict[str, str], threads: int | None = None, log: Path | None = None) -> None:
    """Runs a command to its end, its output in the file `log` where one is given.

    Raises:
        RuntimeError: it failed; its last lines are the message.
    """
    env = {**os.environ, **more} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    if log is None:
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        error = done.stderr
    else:
        with log.open("a") as file:
            done = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT, text=True)
        error = log.read_text()
    if done.returncode:
        name = " ".join(["penstock", *command[3:]] if "penstock.lightning_modules" in command else command[1:])
        raise RuntimeError(f"{name}:\n{error[-2000:]}")
