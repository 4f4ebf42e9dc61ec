"""How long the command line takes to answer when there is nothing to compute: whole processes, without PyTorch.

`python -m penstock.benchmarks.startup`
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from time import perf_counter

from penstock.benchmarks.report import parser, write

WORDS = {
    "penstock --help": (["--help"], 0),
    "penstock list": (["list"], 0),
    "penstock fit experiment=rectified_flow_digit (wrong choice)": (["fit", "experiment=rectified_flow_digit"], 2),
    "penstock fit experimnt=x (wrong group)": (["fit", "experimnt=x"], 2),
    "penstock ftt (wrong verb)": (["ftt"], 2),
}
HEAVY = ("torch", "lightning", "hydra", "numpy")


def run(words: list[str], expected: int) -> float:
    """Wall seconds of `python -m penstock.lightning_modules <words>`, interpreter included.

    Raises:
        RuntimeError: another exit code than expected.
    """
    start = perf_counter()
    done = subprocess.run([sys.executable, "-m", "penstock.lightning_modules", *words], capture_output=True, text=True)
    spent = perf_counter() - start
    if done.returncode != expected:
        raise RuntimeError(
            f"penstock {' '.join(words)}: exit code {done.returncode}, expected {expected}: {done.stderr}"
        )
    return spent


def imported(words: list[str]) -> list[str]:
    """Which of the heavy packages the command imports."""
    code = (
        f"import sys; from penstock.lightning_modules.cli import main; main({words!r}); print(*sys.modules, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return sorted(set(HEAVY) & set(done.stdout.splitlines()))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `startup.json` and `startup.md`."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=10)
    given = options.parse_args(argv)
    times: dict[str, list[float]] = {name: [] for name in WORDS}
    for _ in range(given.rounds):
        for name, (words, code) in WORDS.items():
            times[name].append(run(words, code))
    rows = [
        {
            "command": f"`{name}`",
            "min, s": min(spent),
            "median, s": median(spent),
            "heavy imports": ", ".join(imported(WORDS[name][0])) or "none",
        }
        for name, spent in times.items()
    ]
    values = {"target": "under 0.5 s, no torch import", "seconds": times}
    write("startup", values, rows, title="Time to answer of the command line", seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
