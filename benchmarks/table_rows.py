"""Rows of a table as runs: each `penstock fit` in a folder named by its configuration, done once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from penstock.benchmarks.machine import facts
from penstock.benchmarks.table_spec import WEIGHTS, Run
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError

RESULT, ATTEMPTS, LOG = "result.json", "attempts.json", "fit.log"
LAST = Path("checkpoints", "last.ckpt")
Runner = Callable[[list[str], Mapping[str, str], Path], int]


def words_of(run: Run, more: list[str], weights: Path | None) -> list[str]:
    """The words of a row, the file of weights put in.

    Raises:
        UserError: the row needs one and there is none.
    """
    if weights is None and any(WEIGHTS in word for word in run.words):
        raise UserError(f"row '{run.row}': found {WEIGHTS} in its words and no file; expected --weights FILE")
    return [*(word.replace(WEIGHTS, str(weights)) for word in run.words), *more]


def key_of(words: list[str], weights: Path | None) -> str:
    """Hash of the composed configuration; of the file of weights its name counts, not its folder."""
    tree, _ = compose(words)
    text = json.dumps(tree, sort_keys=True)
    return hashlib.sha256((text.replace(str(weights), weights.name) if weights else text).encode()).hexdigest()[:12]


def command(words: list[str], folder: Path) -> list[str]:
    """Arguments of `penstock` for a row: it goes on where its folder has a checkpoint."""
    if (folder / LAST).is_file():
        return ["fit", f"ckpt_path={folder / LAST}", f"run_dir={folder}"]
    return ["fit", *words, "logger=csv", f"run_dir={folder}"]


def fit(words: list[str], environment: Mapping[str, str], log: Path) -> int:
    """Runs `penstock <words>` as a process of its own, with its output in `log`; returns the exit code.

    Raises:
        KeyboardInterrupt: after the run was told of one and ended.
    """
    program, stopped = [sys.executable, "-P", "-m", "penstock.lightning_modules", *words], False
    with log.open("a") as file:
        child = subprocess.Popen(
            program, env=dict(environment), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                stopped = True
                child.send_signal(signal.SIGINT)
    if stopped:
        raise KeyboardInterrupt
    return code


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends as Ctrl-C does, and Ctrl-C is heard also by what a shell started in the background, and by runs."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def result(folder: Path) -> dict[str, Any] | None:
    """What a finished row left; None where it has not finished."""
    return _read(folder / RESULT, None)


def finish(
    run: Run, words: list[str], folder: Path, environment: Mapping[str, str], runner: Runner = fit
) -> dict[str, Any]:
    """Runs a row to its end, from its checkpoint where it was stopped before, and writes `result.json`.

    Args:
        run: The row.
        words: Of the command line, see `words_of`.
        folder: Of the run.
        environment: Of the process.
        runner: What runs the command, see `fit`.

    Returns:
        `words`, `key`, `exit_code`, `metrics`, `seed`, `batch`, `epochs`, `seconds` (of all attempts), `attempts`,
        `machine`; of a failed row, which has no file and is tried again, the first four and `log`.
    """
    if found := result(folder):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    start, code = time.perf_counter(), None
    try:
        code = runner(command(words, folder), environment, folder / LOG)
    finally:
        attempts = _read(folder / ATTEMPTS, [])
        attempts.append({"seconds": round(time.perf_counter() - start, 1), "exit_code": code})
        _save(folder / ATTEMPTS, attempts)
    record: dict[str, Any] = {
        "words": [_placeless(word) for word in words],
        "key": folder.name,
        "exit_code": code,
        "metrics": {},
    }
    if code:
        return record | {"log": str(folder / LOG)}
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    record["metrics"] = _read(folder / "metrics.json", {})
    record |= {
        "seed": config["seed_everything"],
        "batch": _batch(config["data"]),
        "epochs": config["trainer"].get("max_epochs"),
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
        "attempts": len(attempts),
        "machine": facts() | ({"threads": int(n)} if (n := environment.get("OMP_NUM_THREADS", "")).isdigit() else {}),
    }
    _save(folder / RESULT, record)
    return record


def _read(path: Path, missing: Any) -> Any:
    """JSON of a file, `missing` where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing


def _batch(data: dict[str, Any]) -> int | None:
    """Global batch of a data module, or of the one that it wraps."""
    own = data.get("init_args") or {}
    inner = own.get("data")
    return own.get("batch_size") or (_batch(inner) if isinstance(inner, dict) else None)


def _placeless(word: str) -> str:
    """A word with the name of a file for its path, which is another on another machine."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).name}" if os.path.isabs(value) else word


def _save(path: Path, value: Any) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
