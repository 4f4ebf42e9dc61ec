"""Tables of papers as data: `conf/table/<name>.yaml`.

    # first comment: what `penstock list tables` says of it
    title: ...
    metrics: [image_auroc, fid/1, fid/*]   # names of metrics.json; with a star that of the most network calls
    tiers:
      smoke:                           # smoke, small or paper
        note: what it takes
        mean: true                     # whether a mean over the rows says something
        seeds: [0, 1, 2]                 # optional: every run once with each; the report has means and deviations
        runs:                            # a run may have `seeds` of its own
          - {row: tile, column: FastFlow, words: [experiment=..., "key={weights}"]}
          - {each: {data.category: [bottle, cable]}, column: ResNet-18, words: [experiment=...]}   # a row a value
          - {row: tile, column: RK45, verb: test, checkpoint: an_experiment, words: [experiment=..., solver=rk45]}
    references:
      - name: paper, CaiT
        source: arXiv id or URL
        certainty: confirmed           # read in the source, or recalled; {default: recalled, mean: confirmed} by row
        note: optional
        values: {image_auroc: {bottle: 1.0, mean: 0.994}}

`{weights}` in a word stands for the file or folder that the command line names. `verb: test` scores without training,
the `checkpoint` where there is one: an experiment (found, or trained first), a run folder or a file.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from penstock.lightning_modules.cli.conf import options
from penstock.lightning_modules.errors import UserError, did_you_mean

TIERS = ("smoke", "small", "paper")
VERBS = ("fit", "test")
CERTAINTIES = ("confirmed", "recalled")
MEAN = "mean"
WEIGHTS = "{weights}"


@dataclass(frozen=True)
class Run:
    """One value of each metric: `penstock <verb> <words>`.

    Attributes:
        row: Line of the table.
        column: Column of the table, of our own numbers.
        words: Of the command line.
        seed: None is the one that the command line names.
        verb: One of `VERBS`.
        checkpoint: What `test` scores: an experiment, a run folder or a file; None where the words say it.
    """

    row: str
    column: str
    words: tuple[str, ...]
    seed: int | None = None
    verb: str = "fit"
    checkpoint: str | None = None


@dataclass(frozen=True)
class Tier:
    """What is run at one price.

    Attributes:
        name: One of `TIERS`.
        note: What it takes.
        mean: Whether the report has the mean over the rows.
        runs: In the order of the table, those of one cell with different seeds.
    """

    name: str
    note: str
    mean: bool
    runs: tuple[Run, ...]

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(run.row for run in self.runs))

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(run.column for run in self.runs))

    def cell(self, row: str, column: str) -> list[Run]:
        """Runs of one number of each metric."""
        return [run for run in self.runs if (run.row, run.column) == (row, column)]


@dataclass(frozen=True)
class Reference:
    """A column of numbers of others.

    Attributes:
        name: Of the column.
        source: arXiv id or URL.
        certainty: Row -> `confirmed` or `recalled`; `default` is that of rows without one of their own.
        note: What differs from our runs, or empty.
        values: Metric -> row -> number; a row may be `mean`.
    """

    name: str
    source: str
    certainty: dict[str, str]
    note: str
    values: dict[str, dict[str, float]]

    def recalled(self, row: str) -> bool:
        """Whether the number of a row was not read in the source."""
        return self.certainty.get(row, self.certainty["default"]) == "recalled"


@dataclass(frozen=True)
class Table:
    """One file of `conf/table`."""

    name: str
    title: str
    metrics: tuple[str, ...]
    tiers: dict[str, Tier]
    references: tuple[Reference, ...]

    def tier(self, name: str) -> Tier:
        """Raises UserError where the table has no such tier."""
        if name not in self.tiers:
            found = ", ".join(self.tiers)
            raise UserError(f"table {self.name}: no tier '{name}'{did_you_mean(name, self.tiers)}; found {found}")
        return self.tiers[name]


def read(name: str) -> Table:
    """The table of a name.

    Raises:
        UserError: there is none, or something in its file is not as the head of this module says.
    """
    known = options("table")
    if name not in known:
        raise UserError(f"table '{name}': no conf/table/{name}.yaml{did_you_mean(name, known)}; {', '.join(known)}")
    path = known[name]
    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}, line {mark.line + 1 if mark else 1}: can't be read as YAML") from error
    node = _checked(path, "", node, ("title", "metrics", "tiers"), ("references",))
    metrics = tuple(node["metrics"])
    tiers = {key: _tier(path, key, value) for key, value in _checked(path, "tiers", node["tiers"], (), TIERS).items()}
    rows = {MEAN, *(row for tier in tiers.values() for row in tier.rows)}
    references = [_reference(path, entry, metrics, rows) for entry in node.get("references", ())]
    return Table(name, node["title"], metrics, tiers, tuple(references))


def _checked(path: Path, place: str, node: Any, needed: tuple[str, ...], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """A mapping with the keys `needed` and perhaps some of `more`."""
    where = f"{path}: {place + ': ' if place else ''}"
    if not isinstance(node, dict):
        raise UserError(f"{where}found {type(node).__name__}, expected keys {', '.join((*needed, *more))}")
    for key in node:
        if key not in (*needed, *more):
            near = did_you_mean(str(key), (*needed, *more))
            raise UserError(f"{where}unknown key '{key}'{near}; expected {', '.join((*needed, *more))}")
    if missing := [key for key in needed if key not in node]:
        raise UserError(f"{where}no {', '.join(missing)}; found {', '.join(map(str, node)) or 'nothing'}")
    return node


def _tier(path: Path, name: str, node: Any) -> Tier:
    place = f"tiers.{name}"
    node = _checked(path, place, node, ("note", "mean", "runs"), ("seeds",))
    runs: list[Run] = []
    cells: list[tuple[str, str]] = []
    for entry in node["runs"]:
        more = ("row", "each", "seeds", "verb", "checkpoint")
        entry = _checked(path, f"{place}.runs", entry, ("column", "words"), more)
        if ("row" in entry) == ("each" in entry):
            raise UserError(f"{path}: {place}.runs: found {sorted(entry)}, expected one of row, each")
        how = _verb(path, place, entry)
        seeds = _seeds(path, place, entry.get("seeds", node.get("seeds", [None])))
        if "row" in entry:
            found = [Run(entry["row"], entry["column"], tuple(entry["words"]), **how)]
        else:
            ((key, values),) = entry["each"].items()
            found = [Run(str(value), entry["column"], (*entry["words"], f"{key}={value}"), **how) for value in values]
        cells += [(run.row, run.column) for run in found]
        runs += [replace(run, seed=seed) for run in found for seed in seeds]
    if double := next((cell for cell in cells if cells.count(cell) > 1), None):
        raise UserError(f"{path}: {place}.runs: two of row '{double[0]}' in column '{double[1]}', expected one")
    return Tier(name, node["note"], node["mean"], tuple(runs))


def _verb(path: Path, place: str, entry: dict[str, Any]) -> dict[str, Any]:
    verb, checkpoint = entry.get("verb", "fit"), entry.get("checkpoint")
    if verb not in VERBS:
        near = did_you_mean(str(verb), VERBS)
        raise UserError(f"{path}: {place}.runs: verb '{verb}'{near}; expected {' or '.join(VERBS)}")
    if checkpoint is not None and verb != "test":
        raise UserError(f"{path}: {place}.runs: checkpoint '{checkpoint}' beside verb '{verb}', expected verb: test")
    return {"verb": verb, "checkpoint": checkpoint}


def _seeds(path: Path, place: str, seeds: Any) -> list[int | None]:
    if not isinstance(seeds, list) or not seeds or len({*map(str, seeds)}) < len(seeds):
        raise UserError(f"{path}: {place}.seeds: found {seeds}, expected a list of different whole numbers")
    return seeds


def _reference(path: Path, node: Any, metrics: tuple[str, ...], rows: set[str]) -> Reference:
    node = _checked(path, "references", node, ("name", "source", "certainty", "values"), ("note",))
    place, certainty = f"references: {node['name']}", node["certainty"]
    certainty = {"default": certainty} if isinstance(certainty, str) else certainty
    certainty = _checked(path, f"{place}: certainty", certainty, ("default",), tuple(sorted(rows)))
    if wrong := [value for value in certainty.values() if value not in CERTAINTIES]:
        near = did_you_mean(str(wrong[0]), CERTAINTIES)
        raise UserError(f"{path}: {place}: certainty '{wrong[0]}'{near}; expected {' or '.join(CERTAINTIES)}")
    for metric, values in _checked(path, f"{place}: values", node["values"], (), metrics).items():
        _checked(path, f"{place}: {metric}", values, (), tuple(sorted(rows)))
    return Reference(node["name"], node["source"], certainty, node.get("note", ""), node["values"])
