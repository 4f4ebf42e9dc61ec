"""Kills and resumes a run of two ranks at random moments, and compares its last bits with a run left alone.

`python -m penstock.benchmarks.soak experiment=rectified_flow_digits trainer.max_epochs=20 --rounds 20`: `penstock fit`
with these words under `strategy=ddp` on two CPU processes, once undisturbed, and once killed (SIGKILL, all its
processes at once) so many times and resumed from what lies on the disk. One kill in four comes while the run is
starting, the others after it has saved something new. The exit code is 1 where anything differs.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from penstock.benchmarks.bits import differing, metrics
from penstock.benchmarks.report import parser, write
from penstock.lightning_modules.checkpoints import load_checkpoint

WORDS = ["strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "logger=csv"]
WORDS += ["callbacks.checkpoint.every_n_epochs=null", "callbacks.checkpoint.every_n_train_steps=1"]
AT_START = 0.25
LAST = Path("checkpoints", "last.ckpt")


class Times(NamedTuple):
    """Seconds of the undisturbed run: until its first checkpoint, and from there to its end."""

    start: float
    work: float


class Killed(NamedTuple):
    """How a round ended: `step` is that of the checkpoint on the disk, None where there is none yet."""

    seconds: float
    starting: bool
    step: int | None


def started(words: list[str], run: Path, threads: int | None) -> subprocess.Popen:
    """`penstock fit` in a session of its own, so that one signal reaches all its processes; goes on where it can."""
    resumed = [f"ckpt_path={run / LAST}"] if (run / LAST).exists() else words
    command = [sys.executable, "-m", "penstock.lightning_modules", "fit", *resumed]
    env = {**os.environ, "RUN_DIR": str(run), "OMP_NUM_THREADS": str(threads or 1)}
    run.mkdir(parents=True, exist_ok=True)
    with (run / "soak.log").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def saved(run: Path) -> int:
    """When the last checkpoint was written; 0 before there is one."""
    return (run / LAST).stat().st_mtime_ns if (run / LAST).exists() else 0


def undisturbed(words: list[str], run: Path, threads: int | None) -> Times:
    """Runs to the end.

    Raises:
        RuntimeError: it failed.
    """
    begun, first = time.perf_counter(), None
    process = started(words, run, threads)
    while process.poll() is None:
        if first is None and saved(run):
            first = time.perf_counter()
        time.sleep(0.02)
    check(process, run)
    return Times(first - begun, time.perf_counter() - first)


def killed(words: list[str], run: Path, threads: int | None, moment: tuple[bool, float]) -> Killed | None:
    """Starts or resumes the run and kills it; None where it ended before.

    Args:
        words: of the command line.
        run: its folder.
        threads: CPU threads of PyTorch a process.
        moment: whether it is killed while starting, and how many seconds after its start or after its first new save.
    """
    starting, wait = moment
    before, begun = saved(run), time.perf_counter()
    process = started(words, run, threads)
    while not starting and saved(run) == before and process.poll() is None:
        time.sleep(0.01)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        step = load_checkpoint(run / LAST)["global_step"] if saved(run) else None
        return Killed(time.perf_counter() - begun, starting, step)
    check(process, run)
    return None


def check(process: subprocess.Popen, run: Path) -> None:
    """Waits for a run and refuses it where it went wrong.

    Raises:
        RuntimeError: it did; the end of what it said is the message.
    """
    if process.wait():
        raise RuntimeError(f"exit code {process.returncode}: {(run / 'soak.log').read_text()[-2000:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `soak_<experiment>.json` and `.md`."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=20, help="kills")
    options.add_argument("words", nargs="+", help="experiment=NAME and further words for penstock fit")
    given = options.parse_intermixed_args(argv)
    name = next((word.partition("=")[2] for word in given.words if word.startswith("experiment=")), None)
    if name is None:
        options.error("expected experiment=NAME")
    words, moments = [*given.words, f"seed_everything={given.seed}", *WORDS], random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, soaked = Path(folder, "alone"), Path(folder, "soaked")
        times, rounds = undisturbed(words, alone, given.threads), []
        while len(rounds) < given.rounds:
            starting = moments.random() < AT_START
            longest = times.start if starting else times.work / given.rounds
            found = killed(words, soaked, given.threads, (starting, moments.uniform(0, longest)))
            if found is None:
                raise RuntimeError(f"the run ended after {len(rounds)} kills; give it more steps: trainer.max_epochs=N")
            rounds.append(found)
        check(started(words, soaked, given.threads), soaked)
        different, same_rows = differing(soaked, alone), metrics(soaked) == metrics(alone)
        steps = load_checkpoint(alone / LAST)["global_step"]
    values = {"rounds": given.rounds, "steps": steps, "differing": different, "same_metrics": same_rows}
    values |= {"times": times._asdict(), "words": words}
    rows = [
        {
            "kill": number,
            "seconds after start": one.seconds,
            "while": "starting" if one.starting else "training",
            "last step on the disk": one.step,
        }
        for number, one in enumerate(rounds, 1)
    ]
    verdict = "the same bits, the same metrics.csv" if same_rows and not different else "NOT the same"
    title = f"{name}, two ranks, {given.rounds} kills in {steps} steps: {verdict} as never killed"
    write(f"soak_{name}", values, rows, title=title, seed=given.seed, out=given.out)
    return int(bool(different) or not same_rows)


if __name__ == "__main__":
    sys.exit(main())
