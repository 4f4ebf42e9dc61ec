"""Rows of a table as runs: each `penstock fit` or `test` in a folder named by its configuration, done once."""

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

from penstock.benchmarks.table_spec import WEIGHTS, Run
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.teacher import find_or_train, known
from penstock.lightning_modules.errors import UserError

RESULT, ATTEMPTS, LOG, SCORES = "result.json", "attempts.json", "fit.log", "scores"
LAST = Path("checkpoints", "last.ckpt")
CHECKPOINT = "checkpoint"
Runner = Callable[[list[str], Mapping[str, str], Path], int]


def words_of(run: Run, more: list[str], weights: Path | None) -> list[str]:
    """The words of a row, the file or folder of weights put in.

    Raises:
        UserError: the row needs one and there is none.
    """
    if weights is None and any(WEIGHTS in word for word in run.words):
        raise UserError(f"row '{run.row}': found {WEIGHTS} in its words and no file; expected weights=FILE")
    return [*(word.replace(WEIGHTS, str(weights)) for word in run.words), *more]


def key_of(words: list[str], weights: Path | None, run: Run | None = None) -> str:
    """Hash of the composed configuration, of a test also of its verb and checkpoint.

    Of the file of weights its name counts, not its folder; of a folder of weights nothing but what is named in it.
    """
    tree, _ = compose(words)
    text = json.dumps(tree, sort_keys=True)
    if weights:
        text = text.replace(str(weights), WEIGHTS if weights.is_dir() else weights.name)
    if run and run.verb != "fit":
        text = f"{run.verb} {run.checkpoint}\n{text}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def command(run: Run, words: list[str], folder: Path, checkpoint: str | None = None) -> list[str]:
    """Arguments of `penstock` for a row: a fit goes on where its folder has a checkpoint."""
    if run.verb == "fit" and (folder / LAST).is_file():
        return ["fit", f"ckpt_path={folder / LAST}", f"run_dir={folder}"]
    scored = [f"ckpt_path={checkpoint}"] if checkpoint else []
    return [run.verb, *words, *scored, "logger=csv", f"run_dir={folder}"]


def plain(run: Run, words: list[str], folder: Path) -> list[list[str]]:
    """The commands of a row, to be run anywhere, one after the other: first the training that it scores, if any."""
    if run.checkpoint is None:
        return [command(run, words, folder)]
    if (path := Path(known(run.checkpoint, CHECKPOINT))).exists():
        return [command(run, words, folder, str(path / LAST if path.is_dir() else path))]
    trained = Path("runs", run.checkpoint, "table")
    first = ["fit", f"experiment={run.checkpoint}", f"run_dir={trained}"]
    return [first, command(run, words, folder, str(trained / LAST))]


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
    """What a finished row left, with what its files say beside that; None where it has not finished.

    Metrics that other programs measured, such as `python -m penstock.benchmarks.t2i`, lie in `scores/*.json`; those of
    samples of k network calls in `scores/k/*.json`, and get `/k` to their names.
    """
    found = _read(folder / RESULT, None)
    if found and "ranks" not in found and (folder / "config.yaml").is_file():
        from penstock.benchmarks.table_facts import of_run

        found = of_run(folder) | found
    for path in sorted((folder / SCORES).rglob("*.json")) if found else ():
        calls = f"/{path.parent.name}" if path.parent.name.isdigit() else ""
        scores = {f"{k}{calls}": v for k, v in _read(path, {}).items() if isinstance(v, int | float)}
        found["metrics"] |= scores
    return found


def finish(
    run: Run, words: list[str], folder: Path, environment: Mapping[str, str], runner: Runner = fit
) -> dict[str, Any]:
    """Runs a row to its end, from its checkpoint where it was stopped before, and writes `result.json`.

    Args:
        run: The row; the training that a test scores is found, or run first.
        words: Of the command line, see `words_of`.
        folder: Of the run.
        environment: Of the process.
        runner: What runs the command, see `fit`.

    Returns:
        `verb`, `words`, `key`, `exit_code`, `metrics`, what `table_facts.of_run` says, `seconds` (of all attempts),
        `attempts`, `machine`; of a failed row, which has no file and is tried again, the first five and `log`.
    """
    if found := result(folder):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    start, code = time.perf_counter(), None
    try:
        code = _run(run, words, folder, environment, runner)
    finally:
        attempts = _read(folder / ATTEMPTS, [])
        attempts.append({"seconds": round(time.perf_counter() - start, 1), "exit_code": code})
        _save(folder / ATTEMPTS, attempts)
    scored = [f"ckpt_path={run.checkpoint}"] if run.checkpoint else []
    record: dict[str, Any] = {
        "verb": run.verb,
        "words": [_placeless(word) for word in [*words, *scored]],
        "key": folder.name,
        "exit_code": code,
        "metrics": {},
    }
    if code:
        return record | {"log": str(folder / LOG)}
    from penstock.benchmarks.machine import facts
    from penstock.benchmarks.table_facts import of_run

    record["metrics"] = _read(folder / "metrics.json", {})
    record |= of_run(folder) | {
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
        "attempts": len(attempts),
        "machine": facts() | ({"threads": int(n)} if (n := environment.get("OMP_NUM_THREADS", "")).isdigit() else {}),
    }
    _save(folder / RESULT, record)
    return record


def _run(run: Run, words: list[str], folder: Path, environment: Mapping[str, str], runner: Runner) -> int:
    try:
        checkpoint = find_or_train(run.checkpoint, CHECKPOINT) if run.checkpoint else None
    except UserError as error:
        (folder / LOG).write_text(f"{error}\n", encoding="utf-8")
        return 2
    return runner(command(run, words, folder, checkpoint), environment, folder / LOG)


def _read(path: Path, missing: Any) -> Any:
    """JSON of a file, `missing` where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing


def _placeless(word: str) -> str:
    """A word with the name of a file for its path, which is another on another machine."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).name}" if os.path.isabs(value) else word


def _save(path: Path, value: Any) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
