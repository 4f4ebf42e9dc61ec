"""`penstock fit` as a process of its own, in a folder that is thrown away or kept."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COST = "cost.json"


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
        fit(["logger=csv", *words], Path(folder), threads)
        yield Path(folder)


def kept(words: list[str], run: Path, threads: int | None = None) -> None:
    """`penstock fit <words>` in the folder `run`: nothing where it has finished, and it goes on where it was stopped.

    `cost.json` in the folder then holds `seconds` and `cpu_seconds` of the whole process (set-up, pairs, pictures and
    test included), unless it was stopped on the way.

    Raises:
        RuntimeError: the run failed; its last lines are the message.
    """
    metrics, last = run / "metrics.json", run / "checkpoints" / "last.ckpt"
    if metrics.is_file() and last.is_file() and "test/loss" in json.loads(metrics.read_text()):
        return
    new, start = not run.exists(), time.perf_counter()
    run.mkdir(parents=True, exist_ok=True)
    used = fit([f"ckpt_path={last}"] if last.is_file() else ["logger=csv", *words], run, threads, run / "fit.log")
    if new:
        (run / COST).write_text(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": used}))


def fit(words: list[str], run: Path, threads: int | None = None, log: Path | None = None) -> float:
    """`penstock fit <words>` with the run folder `run`; see `process`."""
    command = [sys.executable, "-m", "penstock.lightning_modules", "fit", *words]
    return process(command, {"RUN_DIR": str(run)}, threads, log)


def process(command: list[str], more: dict[str, str], threads: int | None = None, log: Path | None = None) -> float:
    """Runs a command to its end, its output in the file `log` where one is given; returns its CPU seconds.

    Raises:
        RuntimeError: it failed; its last lines are the message.
    """
    env = {**os.environ, **more} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with log.open("a+") if log else tempfile.TemporaryFile("w+") as file:
        child = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            file.seek(0)
            what = command[1:] if "penstock.lightning_modules" not in command else ["penstock", *command[3:]]
            raise RuntimeError(f"{' '.join(what)}:\n{file.read()[-2000:]}")
    return used.ru_utime + used.ru_stime
