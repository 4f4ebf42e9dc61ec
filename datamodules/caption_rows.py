"""Tables of captions: their lines, and what a line says."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from penstock.lightning_modules.errors import UserError

FILE_KEYS = ("file", "file_name", "image")
TEXT_KEYS = ("text", "caption", "captions", "prompt")


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, entries) of JSON lines or of a CSV file with a header.

    Raises:
        UserError: a line that is no JSON object.
    """
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix.lower() == ".csv":
            for row in (reader := csv.DictReader(lines)):
                yield reader.line_num, row
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file} line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f'{file} line {number}: expected an object like {{"file": "a.png", "text": "a cat"}}')
            yield number, row


def entry_of(row: dict[str, Any], keys: Sequence[str], place: str) -> Any:
    """The first entry of `row` that has one of the names `keys`.

    Raises:
        UserError: none has; `place` starts the line.
    """
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    found = ", ".join(str(k) for k in row if k is not None)
    raise UserError(f"{place}: no '{keys[0]}'; found {found or 'nothing'}, expected one of {', '.join(keys)}")


def caption_texts(value: Any, place: str) -> tuple[str, ...]:
    """One caption or several.

    Raises:
        UserError: something else, or an empty one; `place` starts the line.
    """
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list | tuple) else None
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{place}: found {value!r:.60}, expected a caption, or a list of captions, that is not empty")
    return texts
