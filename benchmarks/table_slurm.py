"""The runs of a table as a SLURM array: a task a run, which goes on where it was stopped and does nothing twice."""

import shlex
from pathlib import Path

from penstock.benchmarks.tables import Asked, planned
from penstock.lightning_modules.errors import UserError

SCRIPT = """\
#!/bin/bash
# {title}, tier {tier}: {n} runs. {note}
# sbatch {file}                  runs them; again, what is left of them
# {line}
#                                then makes the report
# A task takes one node with all its devices; partition, time, memory and devices are the cluster's own.
#SBATCH --job-name={name}
#SBATCH --array=1-{n}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:TERM@120
#SBATCH --output={log}
set -eu
cd {here}
exec {line} run="$SLURM_ARRAY_TASK_ID"
"""


def write(asked: Asked, path: Path, words: list[str]) -> str:
    """Writes the script, and the folder of its logs.

    SLURM ends a task with SIGTERM two minutes before its time is over: the run saves and stops.

    Args:
        asked: Of the command line.
        path: Of the script.
        words: Of the command line, without `slurm=`.

    Returns:
        How to start it.

    Raises:
        UserError: the file can't be written.
    """
    plan, _ = planned(asked)
    logs = asked.out / "slurm"
    text = SCRIPT.format(
        title=asked.spec.title,
        tier=asked.tier.name,
        note=" ".join(asked.tier.note.split()),
        n=len(plan),
        file=shlex.quote(str(path)),
        line=shlex.join(["penstock", "table", *words]),
        name=f"{asked.spec.name}_{asked.tier.name}",
        log=logs / "%A_%a.log",
        here=shlex.quote(str(Path.cwd())),
    )
    try:
        logs.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"table slurm={path}: can't be written ({error.strerror})") from error
    return f"written: {path}, {len(plan)} tasks; sbatch {shlex.quote(str(path))}"
