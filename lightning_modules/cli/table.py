"""`penstock table NAME`: a paper's table, our numbers beside the paper's; the rows are runs of `fit` and `test`."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.lightning_modules.cli.compose import KEYS, OWN, split_word
from penstock.lightning_modules.cli.conf import groups, options
from penstock.lightning_modules.cli.given import typed
from penstock.lightning_modules.errors import UserError, did_you_mean

DRY = "--dry-run"
MODES = ("auto", "online", "offline", "disabled")
LOGGERS = ("wandb", "csv")
WORDS: dict[str, Callable[[str], Any]] = {
    "tier": str,
    "data": Path,
    "weights": Path,
    "only": str,
    "seed": int,
    "threads": int,
    "out": Path,
    "report": Path,
    "run": int,
    "slurm": Path,
    "logger": str,
    "logger.wandb.project": str,
    "logger.wandb.entity": str,
    "logger.wandb.mode": str,
}
OF_ROWS = ("experiment", "data", "logger", "seed_everything", "ckpt_path")  # words that rows have themselves
HELP = f"""\
usage: penstock table NAME [word=value ...] [{DRY}]

  tier=smoke         smoke, small or paper: what a table takes stands in its note
  data=FOLDER        folder of the data sets' folders; PENSTOCK_DATA otherwise
  weights=FILE       file or folder of weights, for rows that need one
  only=ROW           this row; may be given again
  seed=0             of rows without seeds of their own
  threads=N          CPU threads of a run
  out=FOLDER         where the rows lie (runs/tables); finished ones are kept
  report=FOLDER      where the report lies, that of out otherwise
  logger=csv         files alone; else the report goes to W&B too, see logger.wandb.project, .entity, .mode
  any other word     of penstock fit, for every row: trainer.max_epochs=2, perf=bf16
  {DRY}          prints the commands of the rows and stops
  slurm=FILE         writes a SLURM array, a task a row, and stops
  run=N              the Nth run alone, without a report: what such a task does

penstock table lists the tables. Stopped at any moment, the same command goes on.
"""


def run_table(words: list[str], runner: Callable | None = None) -> int:
    """Runs a tier of a table; returns the exit code: 0, 1 where a run failed, 130 where it was stopped.

    Args:
        words: Of the command line.
        runner: What runs a row, see `table_rows.fit`, which it is by default.

    Raises:
        UserError: an unknown table, tier, row or word, no such folder or file, or a damaged file of a table.
    """
    if {"-h", "--help"} & {*words}:
        print(HELP, end="")
        return 0
    if not words:
        from penstock.lightning_modules.cli.listing import run_list

        return run_list(["tables"])
    name, dry = _name([word for word in words if word != DRY]), DRY in words
    given, more = _given([word for word in words if word not in (name, DRY)])
    from penstock.benchmarks import tables
    from penstock.benchmarks.table_spec import read

    spec = read(name)
    tier = spec.tier(given.get("tier", "smoke"))
    only = tuple(given.get("only", ()))
    tables.check_rows(tier, only)
    if "seed" in given and any(run.seed is not None for run in tier.runs):
        raise UserError(f"seed={given['seed']}: tier {tier.name} of {name} has seeds of its own, expected no seed")
    own = {"PENSTOCK_DATA": str(given["data"].resolve())} if "data" in given else {}
    own |= {"OMP_NUM_THREADS": str(given["threads"])} if "threads" in given else {}
    asked = tables.Asked(
        spec=spec,
        tier=tier,
        only=only,
        more=tuple(more),
        seed=given.get("seed", 0),
        weights=given["weights"].resolve() if "weights" in given else None,
        out=given.get("out", Path("runs", "tables")).resolve(),
        report=given.get("report"),
        own=own,
        line=_line(words),
        wandb=_wandb(given),
    )
    if dry:
        print("\n".join(tables.commands(asked)))
        return 0
    if "slurm" in given:
        from penstock.benchmarks.table_slurm import write

        print(write(asked, given["slurm"], [word for word in words if not word.startswith(("slurm=", "run="))]))
        return 0
    return tables.carry_out(asked, given.get("run"), *([runner] if runner else []))


def _name(words: list[str]) -> str:
    """The table's name among the words.

    Raises:
        UserError: there is none, or two, or an unknown flag.
    """
    names = [word for word in words if "=" not in word]
    if flag := next((word for word in names if word.startswith("-")), None):
        raise UserError(f"table {flag}: expected {DRY} or --help{did_you_mean(flag, [DRY, '--help'])}")
    known = options("table")
    if len(names) != 1:
        found = f"found {', '.join(names)}" if names else "no name"
        raise UserError(f"table: {found}; expected one of {', '.join(known)}")
    return names[0]


def _given(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Our own words with their values, and those of the rows."""
    given: dict[str, Any] = {}
    more = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "only":
            given.setdefault("only", []).append(value)
        elif key in WORDS:
            given[key] = typed(key, value, WORDS[key])
        elif key in OF_ROWS or key.lstrip("+~").partition(".")[0] not in (*KEYS, *OWN, *groups()):
            near = did_you_mean(key, [*WORDS, *KEYS, *groups()])
            raise UserError(f"table {word}: unknown{near}; expected {', '.join(WORDS)}, or a key of the rows")
        else:
            split_word(word)
            more.append(word)
    for key, known in (("logger", LOGGERS), ("logger.wandb.mode", MODES)):
        if key in given and given[key] not in known:
            near = did_you_mean(given[key], known)
            raise UserError(f"table {key}={given[key]}: expected one of {', '.join(known)}{near}")
    if "data" in given and not given["data"].is_dir():
        raise UserError(f"table data={given['data']}: no such folder")
    if "weights" in given and not given["weights"].exists():
        raise UserError(f"table weights={given['weights']}: no such file or folder")
    return given, more


def _wandb(given: dict[str, Any]) -> dict[str, str] | None:
    """Options of W&B; None where it is left out."""
    if given.get("logger") == "csv":
        return None
    return {key.rpartition(".")[2]: value for key, value in given.items() if key.startswith("logger.wandb.")}


def _line(words: list[str]) -> str:
    """The command line, paths relative to the working folder."""
    shown = []
    for word in words:
        key, _, value = word.partition("=")
        shown.append(f"{key}={os.path.relpath(value)}" if os.path.isabs(value) else word)
    return shlex.join(["penstock", "table", *shown])
