"""A paper's table: runs what is missing of a tier and sets our numbers beside those of others.

`python -m penstock.benchmarks.tables fastflow_mvtec --tier smoke --data FOLDER --weights FILE`. A row that has finished
is kept under the hash of its configuration and not run again, also for other tables, nor is one that the report
already there has, made on whatever machine; stopped by Ctrl-C, the same command goes on. `--dry-run` prints the
commands, to be run anywhere: whoever has the folders `rows/` has the table.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from penstock.benchmarks import table_report, table_rows
from penstock.benchmarks.report import parser
from penstock.benchmarks.table_spec import TIERS, WEIGHTS, Run, Table, Tier, read
from penstock.lightning_modules.errors import UserError, did_you_mean

OUT = Path("runs", "tables")
Planned = list[tuple[Run, list[str], Path]]


def check_rows(tier: Tier, only: list[str]) -> None:
    """Raises UserError where a tier has no such row."""
    for row in only:
        if row not in tier.rows:
            raise UserError(f"--only {row}: no such row{did_you_mean(row, tier.rows)}; found {', '.join(tier.rows)}")


def planned(
    tier: Tier, only: list[str], more: list[str], weights: Path | None, out: Path, seed: int
) -> tuple[Planned, Planned]:
    """Words and folder of every run: of the rows `only`, or all, and of the others that words can be made for."""
    asked, others = [], []
    for run in tier.runs:
        mine = not only or run.row in only
        if not mine and not weights and any(WEIGHTS in word for word in run.words):
            continue
        seeded = f"seed_everything={seed if run.seed is None else run.seed}"
        words = table_rows.words_of(run, [seeded, *more], weights)
        place = out / "rows" / table_rows.key_of(words, weights)
        (asked if mine else others).append((run, words, place))
    return asked, others


def make(
    spec: Table,
    tier: Tier,
    plan: Planned,
    others: Planned,
    out: Path,
    environment: dict[str, str],
    runner: table_rows.Runner,
) -> int:
    """Runs what has not finished of `plan` and writes the report, with finished ones of `others`; also when stopped.

    Finished is what left a result in its folder, or stands in the report that `out` already has.

    Returns:
        0, 1 where a run failed, 130 where it was stopped.
    """
    results: table_report.Results = {}
    earlier = table_report.earlier(spec, tier, out)
    for run, _, folder in [*plan, *others]:
        if found := table_rows.result(folder) or earlier.get(folder.name):
            results[run] = found
    code = 0
    try:
        for number, (run, words, folder) in enumerate(plan, start=1):
            known = "kept" if run in results else "running"
            seeded = "" if run.seed is None else f", seed {run.seed}"
            print(f"{number} of {len(plan)}: {run.row}, {run.column}{seeded}: {known}, {folder}", flush=True)
            if run not in results:
                results[run] = table_rows.finish(run, words, folder, environment, runner)
            if (found := results[run])["exit_code"]:
                code = 1
                print(f"failed with exit code {found['exit_code']}: {found['log']}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        code = 130
    print(table_report.write(spec, tier, results, out).read_text(encoding="utf-8"))
    return code


def main(argv: Sequence[str] | None = None, runner: table_rows.Runner = table_rows.fit) -> int:
    """Runs a tier of a table; returns the exit code."""
    options = parser(__doc__)
    options.set_defaults(out=OUT, seed=None)
    options.add_argument("table", help="name of a file in conf/table (penstock list tables)")
    options.add_argument("--tier", default="smoke", choices=TIERS)
    options.add_argument("--data", type=Path, help="PENSTOCK_DATA of the runs: folder of the data sets' folders")
    options.add_argument("--weights", type=Path, help="file of weights for rows that need one")
    options.add_argument("--only", action="append", default=[], metavar="ROW", help="one row; may be given again")
    options.add_argument("--word", action="append", default=[], help="a further word for penstock fit")
    options.add_argument("--report", type=Path, help="folder of the report; that of --out by default")
    options.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    given = options.parse_args(argv)
    try:
        return _main(given, runner)
    except UserError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2


def _main(given, runner: table_rows.Runner) -> int:
    spec = read(given.table)
    tier = spec.tier(given.tier)
    if given.weights and not given.weights.is_file():
        raise UserError(f"--weights {given.weights}: no such file")
    if given.data and not given.data.is_dir():
        raise UserError(f"--data {given.data}: no such folder")
    weights, out = given.weights and given.weights.resolve(), given.out.resolve()
    check_rows(tier, given.only)
    if given.seed is not None and any(run.seed is not None for run in tier.runs):
        raise UserError(
            f"--seed {given.seed}: tier {tier.name} of {given.table} has seeds of its own, expected no --seed"
        )
    plan, others = planned(tier, given.only, given.word, weights, out, given.seed or 0)
    own = {"PENSTOCK_DATA": str(given.data.resolve())} if given.data else {}
    own |= {"OMP_NUM_THREADS": str(given.threads)} if given.threads else {}
    if given.dry_run:
        for _, words, folder in plan:
            variables = "".join(f"{name}={shlex.quote(value)} " for name, value in own.items())
            print(f"{variables}penstock {shlex.join(table_rows.command(words, folder))}")
        return 0
    environment = {name: value for name, value in os.environ.items() if name != "RUN_DIR"} | own
    with table_rows.terminated_as_interrupted():
        return make(spec, tier, plan, others, given.report or out, environment, runner)


if __name__ == "__main__":
    sys.exit(main())
