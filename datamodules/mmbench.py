"""MMBench (arXiv 2307.06281): questions with up to four options, asked once with each at every letter."""

import base64
import binascii
import csv
import hashlib
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from penstock.datamodules.base import fingerprint
from penstock.datamodules.visual_questions import Fit, Question, QuestionStore, VisualQuestions, found_folder
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.conversation import with_image

LETTERS = "ABCD"
DIRECT = "Answer with the option's letter from the given choices directly."
COLUMNS = ("index", "question", "A", "B", "image")
COPY = 1_000_000  # more than an index: what the copies of a question with turned options are above it


class Base64Source:
    """Images in base64, decoded one by one."""

    labels, class_names = None, ()

    def __init__(self, texts: Sequence[str], places: Sequence[str]) -> None:
        self.texts, self.places = texts, places

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        return self.places[row]

    def open(self, row: int) -> Image.Image:
        try:
            return Image.open(BytesIO(base64.b64decode(self.texts[row], validate=True)))
        except binascii.Error as error:
            raise UserError(f"{self.where(row)}: found an image that is no base64 ({error})") from error

    def content(self) -> str:
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()


class MmBench(VisualQuestions):
    """For evaluation: a TSV file with `index`, `question`, `hint`, `A` to `D`, `answer` and `image` in base64.

    An answer is right where it is the letter of the option (`answers.option`). Rows whose index differs by a million
    are one question with its options turned; in circular evaluation all of these have to be right. Where a file has no
    such rows they are made.

    Args:
        data_dir: folder of the data; `None` = `$PENSTOCK_DATA/mmbench`.
        file: name of the table in it.
        circular: ask each question with its options turned, too; else the first way alone.
        image_size: side of the images.
        fit: see `QuestionStore`.
        batch_size: global batch.
        num_workers: worker processes a rank.

    Raises:
        UserError: a file or a row that is not as described; it is named.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        file: str = "mmbench_dev_20230712.tsv",
        circular: bool = True,
        image_size: int = 512,
        fit: Fit = "pad",
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            fit=fit,
            rule="option",
            batch_size=batch_size,
            eval_batch_size=None,
            num_workers=num_workers,
            seed=None,
        )
        self.data_dir, self.file, self.circular = data_dir, file, circular

    def build(self) -> tuple[QuestionStore, dict[str, np.ndarray]]:
        file = found_folder("mmbench", self.data_dir, self.file) / self.file
        rows = sorted(_rows(file), key=lambda row: int(row["index"]))
        if not rows:
            raise UserError(f"{file}: found no rows, expected at least one question")
        groups = [int(row["index"]) % COPY for row in rows]
        turned = len(set(groups)) < len(groups)
        questions: list[Question] = []
        first = {group: n for n, group in reversed([*enumerate(groups)])}
        for n, row in enumerate(rows):
            if not self.circular and first[groups[n]] != n:
                continue
            options = [row[letter] for letter in LETTERS if _given(row.get(letter))]
            turns = len(options) if self.circular and not turned else 1
            questions += [_question(row, options, turn, n, groups[n]) for turn in range(turns)]
        self.fingerprint = fingerprint("mmbench", [(question.turns, question.answers) for question in questions])
        source = Base64Source([row["image"] for row in rows], [f"{file} index {row['index']}" for row in rows])
        none = np.arange(0)
        numbers = {"train": none, "val": none, "test": np.arange(len(questions))}
        return self.furnish(questions, source), numbers


def _question(row: dict[str, str], options: list[str], turn: int, image: int, group: int) -> Question:
    """A question whose options are moved `turn` places to the front."""
    lines = [row["hint"]] if _given(row.get("hint")) else []
    moved = options[turn:] + options[:turn]
    lines += [row["question"], *(f"{letter}. {text}" for letter, text in zip(LETTERS, moved)), DIRECT]
    answers: tuple[str, ...] = ()
    if _given(row.get("answer")):
        answers = (LETTERS[(LETTERS.index(row["answer"]) - turn) % len(options)],)
    name = row["index"] if not turn else f"{row['index']} turned by {turn}"
    return Question((with_image("\n".join(lines)), *answers), answers, image, group, name)


def _rows(file: Path) -> Iterator[dict[str, str]]:
    """Rows with an index and all that a question needs."""
    if not file.is_file():
        others = [path.name for path in file.parent.glob("*.tsv")]
        raise UserError(f"{file}: no such file{did_you_mean(file.name, others)}; expected a table of MMBench")
    before = csv.field_size_limit(sys.maxsize)  # images are long
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), 2):
                _check(row, f"{file} row {number}")
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a table ({error})") from error
    finally:
        csv.field_size_limit(before)


def _check(row: dict[str, str], place: str) -> None:
    if missing := next((name for name in COLUMNS if not _given(row.get(name))), None):
        raise UserError(f"{place}: found no '{missing}', expected {', '.join(COLUMNS)}, maybe hint, C, D and answer")
    if not row["index"].isdecimal():
        raise UserError(f"{place}: found index '{row['index']}', expected a whole number")
    options = [letter for letter in LETTERS if _given(row.get(letter))]
    if "".join(options) != LETTERS[: len(options)]:
        raise UserError(f"{place}: found options {', '.join(options)}, expected them without a gap")
    if _given(row.get("answer")) and row["answer"] not in options:
        raise UserError(f"{place}: found answer '{row['answer']:.20}', expected one of {', '.join(options)}")


def _given(value: str | None) -> bool:
    return value is not None and value.lower() not in ("", "nan", "none")
