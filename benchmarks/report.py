"""A result as two files, `<name>.json` and `<name>.md`, with the machine, the seed and the command that made it."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from penstock.benchmarks.machine import facts

RESULTS = Path("benchmarks/results")


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has: `--out`, `--seed`, `--threads`."""
    options = argparse.ArgumentParser(description=(text or "").split("\n")[0])
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, help="CPU threads of PyTorch; its own choice by default")
    return options


def write(name: str, values: dict[str, Any], rows: list[dict[str, Any]], *, title: str, seed: int, out: Path) -> Path:
    """Writes `<out>/<name>.json` (everything) and `<out>/<name>.md` (the table); returns the Markdown file.

    Args:
        name: of the files.
        values: every figure, any JSON.
        rows: of the table, all with the same keys; floats are shown with three digits.
        title: first line of the Markdown file.
        seed: of the run.
        out: folder, made where it is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    machine = facts()
    record = {"title": title, "command": command(), "seed": seed, "machine": machine, **values, "rows": rows}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    hardware = ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None)
    text = f"# {title}\n\n{table(rows)}\n\n`{record['command']}`, seed {seed}\n\n{hardware}\n"
    path = out / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same keys."""
    head = list(rows[0])
    lines = [[_cell(key) for key in head], ["---"] * len(head), *([_cell(row[key]) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command() -> str:
    """The command line that is running, paths relative to the working folder."""
    script, *words = sys.argv
    words = [os.path.relpath(word) if os.path.isabs(word) else word for word in words]
    return shlex.join(["python", "-m", f"penstock.benchmarks.{Path(script).stem}", *words])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (f"{value:.3g}" if isinstance(value, float) else str(value)).replace("|", "\\|")
