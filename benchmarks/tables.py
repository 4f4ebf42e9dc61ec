"""A paper's table: runs what is missing of a tier and sets our numbers beside those of others; `penstock table`.

A row that has finished is kept under the hash of its configuration and not run again, also for other tables, nor is one
that the report already there has, made on whatever machine; stopped by Ctrl-C, the same command goes on. Rows can run
as tasks of a SLURM array, or anywhere by their plain commands: whoever has the folders `rows/` has the table.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from penstock.benchmarks import table_rows
from penstock.benchmarks.table_spec import WEIGHTS, Run, Table, Tier
from penstock.lightning_modules.errors import UserError, did_you_mean

Planned = list[tuple[Run, list[str], Path]]


@dataclass(frozen=True)
class Asked:
    """What a command line asks of a table.

    Attributes:
        spec: The table.
        tier: Of it.
        only: Rows to run; all where it is empty.
        more: Further words of every run.
        seed: Of rows without seeds of their own.
        weights: File or folder for `{weights}`.
        out: Folder of the rows, and of the report where `report` is None.
        report: Folder of the report.
        own: Variables of the environment that runs get.
        line: The command line, for the report.
        wandb: Options of W&B, see `table_wandb.send`; None leaves it out.
    """

    spec: Table
    tier: Tier
    only: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    seed: int = 0
    weights: Path | None = None
    out: Path = Path("runs", "tables")
    report: Path | None = None
    own: dict[str, str] = field(default_factory=dict)
    line: str = ""
    wandb: dict[str, str] | None = None


def check_rows(tier: Tier, only: tuple[str, ...]) -> None:
    """Raises UserError where a tier has no such row."""
    for row in only:
        if row not in tier.rows:
            raise UserError(f"only={row}: no such row{did_you_mean(row, tier.rows)}; found {', '.join(tier.rows)}")


def planned(asked: Asked) -> tuple[Planned, Planned]:
    """Words and folder of every run: of the rows `only`, or all, and of the others that words can be made for."""
    mine, others = [], []
    for run in asked.tier.runs:
        wanted = not asked.only or run.row in asked.only
        if not wanted and not asked.weights and any(WEIGHTS in word for word in run.words):
            continue
        seeded = f"seed_everything={asked.seed if run.seed is None else run.seed}"
        words = table_rows.words_of(run, [seeded, *asked.more], asked.weights)
        place = asked.out / "rows" / table_rows.key_of(words, asked.weights, run)
        (mine if wanted else others).append((run, words, place))
    return mine, others


def commands(asked: Asked) -> list[str]:
    """Plain commands of the rows, one a line, for a shell."""
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in asked.own.items())
    plan, _ = planned(asked)
    lines = [words for run, row, folder in plan for words in table_rows.plain(run, row, folder)]
    return list(dict.fromkeys(f"{variables}penstock {shlex.join(words)}" for words in lines))


def task(asked: Asked, number: int, environment: dict[str, str], runner: table_rows.Runner) -> int:
    """Runs one run of the plan, of 1 to its length, to its end and writes no report; returns its exit code.

    Raises:
        UserError: no such number.
    """
    plan, _ = planned(asked)
    if not 1 <= number <= len(plan):
        raise UserError(f"run={number}: no such run; expected 1 to {len(plan)}")
    run, words, folder = plan[number - 1]
    kept = table_rows.result(folder) is not None
    print(f"{_said(run, number, len(plan))}: {'kept' if kept else 'running'}, {folder}", flush=True)
    try:
        return _told(table_rows.finish(run, words, folder, environment, runner))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def make(asked: Asked, environment: dict[str, str], runner: table_rows.Runner) -> int:
    """Runs what has not finished and writes the report, with finished rows that were not asked for; also when stopped.

    Finished is what left a result in its folder, or stands in the report that is already there.

    Returns:
        0, 1 where a run failed, 130 where it was stopped.
    """
    from penstock.benchmarks import table_report

    plan, others = planned(asked)
    folder_of_report = asked.report or asked.out
    results: table_report.Results = {}
    earlier = table_report.earlier(asked.spec, asked.tier, folder_of_report)
    for run, _, folder in [*plan, *others]:
        if found := table_rows.result(folder) or earlier.get(folder.name):
            results[run] = found
    code = 0
    try:
        for number, (run, words, folder) in enumerate(plan, start=1):
            print(f"{_said(run, number, len(plan))}: {'kept' if run in results else 'running'}, {folder}", flush=True)
            if run not in results:
                results[run] = table_rows.finish(run, words, folder, environment, runner)
            code = code or _told(results[run])
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        code = 130
    path = table_report.write(asked.spec, asked.tier, results, folder_of_report, asked.line)
    print(path.read_text(encoding="utf-8"))
    if code != 130 and asked.wandb is not None:
        from penstock.benchmarks.table_wandb import send

        print(send(asked.spec, asked.tier, results, path, asked.out, asked.wandb))
    return code


def carry_out(asked: Asked, number: int | None = None, runner: table_rows.Runner = table_rows.fit) -> int:
    """`make`, or `task` where a number is given, in the environment that the runs and their teachers get."""
    for name in [name for name in os.environ if name == "RUN_DIR" or name.startswith("SLURM_")]:
        del os.environ[name]  # ranks are started by the runs themselves
    os.environ.update(asked.own)
    with table_rows.terminated_as_interrupted():
        if number is None:
            return make(asked, dict(os.environ), runner)
        return task(asked, number, dict(os.environ), runner)


def _said(run: Run, number: int, of: int) -> str:
    seeded = "" if run.seed is None else f", seed {run.seed}"
    return f"{number} of {of}: {run.row}, {run.column}{seeded}"


def _told(found: dict) -> int:
    """1 and a line on stderr where a run failed."""
    if found["exit_code"]:
        print(f"failed with exit code {found['exit_code']}: {found['log']}", file=sys.stderr, flush=True)
    return 1 if found["exit_code"] else 0
