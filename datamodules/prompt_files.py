"""Prompts of benchmarks from the files in which their authors publish them."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from penstock.lightning_modules.errors import UserError

PromptFormat = Literal["geneval", "dpg", "vbench", "lines"]
OFFICIAL = {  # where a format's prompts are published, and their usual place in a folder of that name
    "geneval": ("https://github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl", "evaluation_metadata.jsonl"),
    "dpg": ("https://github.com/TencentQQGYLab/ELLA, dpg_bench/prompts", "prompts"),
    "vbench": ("https://github.com/Vchitect/VBench, vbench/VBench_full_info.json", "VBench_full_info.json"),
}

LONGEST = 240


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        name: Unique; what its pictures are called.
        text: The prompt.
        metadata: What a scorer wants to know of it, plain JSON.
    """

    name: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, form: PromptFormat) -> list[Prompt]:
    """All prompts of a file or folder.

    - `geneval`: JSON lines with `tag`, `include`, `prompt`, maybe `exclude` (arXiv 2310.11513); names 00000, 00001 ...
      are those of the lines.
    - `dpg`: a folder of `<name>.txt`, or the table with `item_id` and `text`, of which each prompt has several rows
      (arXiv 2403.05135); in the order of the names, so that both give the same.
    - `vbench`: a JSON list of objects with `prompt_en` and `dimension` (arXiv 2311.17982); the prompt is the name. Two
      of the same prompt are one, with the dimensions of both.
    - `lines`: a prompt a line, empty lines left out; names as `geneval`.

    Raises:
        UserError: the file or line at fault.
    """
    if not path.exists():
        where = f"; get it from {OFFICIAL[form][0]}" if form in OFFICIAL else ""
        raise UserError(f"data.path: no file or folder {path}; expected prompts of the format '{form}'{where}")
    if form != "dpg" and path.is_dir():
        raise UserError(f"data.path: {path} is a folder; expected the file of the format '{form}'")
    try:
        prompts = {"geneval": _geneval, "dpg": _dpg, "vbench": _vbench, "lines": _lines}[form](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text ({error.reason}); expected UTF-8") from error
    if not prompts:
        raise UserError(f"{path}: no prompts in it; expected at least one of the format '{form}'")
    return prompts


def _geneval(path: Path) -> list[Prompt]:
    found = []
    for number, line in _written(path):
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        keys = ("tag", "include", "prompt")
        if not isinstance(row, dict) or any(key not in row for key in keys):
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{place}: found {has}, expected an object with {', '.join(keys)}")
        found.append(Prompt(f"{len(found):05d}", _text(row["prompt"], place), row))
    return found


def _vbench(path: Path) -> list[Prompt]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {type(rows).__name__}, expected a list of objects with prompt_en, dimension")
    found: dict[str, Prompt] = {}
    for number, row in enumerate(rows, 1):
        place = f"{path} entry {number}"
        if not isinstance(row, dict) or not {"prompt_en", "dimension"} <= row.keys():
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{place}: found {has}, expected an object with prompt_en, dimension")
        text, dimensions = row["prompt_en"], row["dimension"]
        if _text(text, place) != text or any(mark in text for mark in "/\\\0\n") or len(text.encode()) > LONGEST:
            raise UserError(f"{place}: '{text:.40}' cannot be part of a file's name, as VBench's scorer wants it")
        if not isinstance(dimensions, list) or not all(isinstance(dimension, str) for dimension in dimensions):
            raise UserError(f"{place}: dimension {dimensions!r:.60}, expected a list of words")
        known = found.setdefault(text, Prompt(text, text, {"dimension": []}))
        known.metadata["dimension"].extend(d for d in dimensions if d not in known.metadata["dimension"])
    return list(found.values())


def _lines(path: Path) -> list[Prompt]:
    texts = [line.strip() for _, line in _written(path)]
    return [Prompt(f"{n:05d}", text, {"prompt": text}) for n, text in enumerate(texts)]


def _dpg(path: Path) -> list[Prompt]:
    found: dict[str, str] = {}
    for name, text, place in _dpg_folder(path) if path.is_dir() else _dpg_table(path):
        if not name or any(mark in name for mark in "./\\"):
            raise UserError(f"{place}: name '{name}'; expected one without dots and slashes, it names a picture")
        if found.setdefault(name, text) != text:
            raise UserError(f"{place}: another prompt of the name '{name}'; expected one each")
    return [Prompt(name, found[name]) for name in sorted(found)]


def _dpg_folder(path: Path) -> Iterator[tuple[str, str, str]]:
    for file in path.glob("*.txt"):
        yield file.name.removesuffix(".txt"), _text(file.read_text(encoding="utf-8-sig"), str(file)), str(file)


def _dpg_table(path: Path) -> Iterator[tuple[str, str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or []
        if not {"item_id", "text"} <= set(columns):
            raise UserError(f"{path}: columns {', '.join(columns) or 'none'}; expected item_id and text among them")
        for row in reader:
            place = f"{path} line {reader.line_num}"
            yield row["item_id"], _text(row["text"], place), place


def _written(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            yield number, line


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: found {value!r:.60}, expected a prompt that is not empty")
    return value.strip()
