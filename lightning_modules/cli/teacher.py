"""The trained flow that a method starts from: a checkpoint, a run, or an experiment that is found or trained first."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from penstock.lightning_modules.cli.compose import compose, new_run_name
from penstock.lightning_modules.cli.conf import options
from penstock.lightning_modules.cli.run_lock import claimed, wait_until_free
from penstock.lightning_modules.errors import UserError, did_you_mean

LAST = Path("checkpoints", "last.ckpt")


def find_or_train(teacher: str, key: str = "teacher") -> str:
    """The absolute path of the checkpoint of a teacher, or of a run to start from.

    A name of an experiment stands for the newest finished run under `runs/<name>/` that has the experiment's model,
    data and seed; an unfinished one goes on first, and without any the experiment is run. Processes that look for the
    same teacher at once wait for one that trains it, whoever started that.

    Args:
        teacher: A checkpoint, a run folder, or the name of an experiment.
        key: The key that names it, `teacher` or `initial`.

    Raises:
        UserError: none of these, or the training failed.
    """
    path = Path(known(teacher, key))
    if path.exists():
        return str((path / LAST if path.is_dir() else path).resolve())
    wanted = compose([f"experiment={teacher}"], find_or_train)[0]
    home = Path("runs", teacher)
    with _alone(home):
        runs = [run for run in sorted(home.glob("*/"), reverse=True) if _same(run, wanted)]
        for run in filter(claimed, runs):
            print(f"{key}: waits for the process that trains {run}", file=sys.stderr)
            wait_until_free(run)
        for run in runs:
            if _finished(run):
                print(f"{key}: {run / LAST}", file=sys.stderr)
                return str((run / LAST).resolve())
        unfinished = next((run for run in runs if (run / LAST).is_file()), None)
        run = unfinished or home / new_run_name()
        print(f"{key}: {'goes on' if unfinished else 'trains first'}: {run}", file=sys.stderr)
        words = [f"ckpt_path={run / LAST}"] if unfinished else [f"experiment={teacher}"]
        code = _fit(words, run)
    if code in (130, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code or not (run / LAST).is_file():
        raise UserError(f"{key}={teacher}: its training in '{run}' ended with exit code {code}")
    return str((run / LAST).resolve())


def known(teacher: str, key: str) -> str:
    """`teacher` itself, where it is a checkpoint, a run folder or an experiment.

    Raises:
        UserError: none of these.
    """
    path, experiments = Path(teacher), options("experiment")
    if path.is_dir() and not (path / LAST).is_file():
        raise UserError(f"{key}={teacher}: no {LAST} in this folder; expected a run folder or a checkpoint")
    if not path.exists() and teacher not in experiments:
        raise UserError(f"{key}={teacher}: no such file, run folder or experiment{did_you_mean(teacher, experiments)}")
    return teacher


def _fit(words: list[str], run: Path) -> int:
    """Trains in a process of its own, on one device unless the experiment says otherwise; returns the exit code."""
    launched = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    environment = {k: v for k, v in os.environ.items() if k not in launched} | {"RUN_DIR": str(run.resolve())}
    command = [sys.executable, "-P", "-m", "penstock.lightning_modules", "fit", *words]
    with subprocess.Popen(command, env=environment) as process, _ends_with_us(process):
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


@contextmanager
def _ends_with_us(process: subprocess.Popen) -> Iterator[None]:
    """Hands SIGTERM on to `process`; Ctrl-C reaches it from the terminal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".teacher.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _same(run: Path, wanted: dict[str, Any]) -> bool:
    """Whether a run has the model, data, length and seed that an experiment asks for."""
    try:
        saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    length = {k: wanted["trainer"][k] for k in ("max_epochs", "max_steps") if k in wanted["trainer"]}
    asked = {k: wanted[k] for k in ("model", "data", "seed_everything")} | {"trainer": length}
    return _holds(saved, asked)


def _holds(saved: Any, asked: Any) -> bool:
    if isinstance(asked, dict):
        return isinstance(saved, dict) and all(k in saved and _holds(saved[k], v) for k, v in asked.items())
    return saved == asked


def _finished(run: Path) -> bool:
    """Whether the last checkpoint of a run is at the end of its training."""
    if not (run / LAST).is_file():
        return False
    from penstock.lightning_modules.checkpoints import load_checkpoint

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    try:
        checkpoint = load_checkpoint(run / LAST)
    except UserError:
        return False
    epochs, steps = config.get("max_epochs") or -1, config.get("max_steps") or -1
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
    return 0 < steps <= checkpoint["global_step"] or 0 < epochs <= done
