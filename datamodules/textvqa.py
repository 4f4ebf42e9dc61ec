"""TextVQA (arXiv 1904.08920): questions about words in images, ten people's answers to each."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from penstock.datamodules.base import fingerprint
from penstock.datamodules.caption_rows import read_rows
from penstock.datamodules.image_sources import FileSource
from penstock.datamodules.visual_questions import (
    Fit,
    Question,
    QuestionStore,
    VisualQuestions,
    found_folder,
    inside,
    read_json,
)
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import with_image

SHORT = "Answer the question using a single word or phrase."
PEOPLE = 10


class TextVqa(VisualQuestions):
    """For evaluation: `{"data": [{"question_id", "image_id", "question", "answers"}, ...]}`, images `<image_id>.jpg`.

    Each question is asked with "Answer the question using a single word or phrase." behind it, as LLaVA-1.5 does, and
    an answer is worth min(n / 3, 1) of n people who gave it (`answers.vqa_accuracy`).

    Args:
        data_dir: folder of the data; `None` = `$PENSTOCK_DATA/textvqa`.
        file: name of the questions in it.
        images: folder of the images in it.
        prompts: name of LLaVA's JSON lines in it, with `question_id` (the image's), and `text`, the question and the
            words that a reader of characters found, which is then asked; `None` = the questions alone.
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
        file: str = "TextVQA_0.5.1_val.json",
        images: str = "train_images",
        prompts: str | None = None,
        image_size: int = 512,
        fit: Fit = "pad",
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            fit=fit,
            rule="vqa",
            batch_size=batch_size,
            eval_batch_size=None,
            num_workers=num_workers,
            seed=None,
        )
        self.data_dir, self.file, self.images, self.prompts = data_dir, file, images, prompts

    def build(self) -> tuple[QuestionStore, dict[str, np.ndarray]]:
        folder = found_folder("textvqa", self.data_dir, f"{self.file} and {self.images}/")
        file = folder / self.file
        found = read_json(file)
        rows = found.get("data") if isinstance(found, dict) else None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{file}: found no rows, expected an object with a list 'data'")
        asked = None if self.prompts is None else _prompts(folder / self.prompts)
        files: list[Path] = []
        questions = [self._question(row, n, f"{file} row {n}", folder, asked, files) for n, row in enumerate(rows)]
        self.fingerprint = fingerprint("textvqa", [(question.turns, question.answers) for question in questions])
        none = np.arange(0)
        numbers = {"train": none, "val": none, "test": np.arange(len(questions))}
        return self.furnish(questions, FileSource(folder, files, None, [])), numbers

    def _question(
        self,
        row: Any,
        number: int,
        place: str,
        folder: Path,
        asked: dict[tuple[str, str], str] | None,
        files: list[Path],
    ) -> Question:
        if not isinstance(row, dict) or not isinstance(row.get("question"), str) or "image_id" not in row:
            raise UserError(f"{place}: found {row!r:.60}, expected question, image_id and answers")
        answers = row.get("answers", [])
        if not isinstance(answers, list) or len(answers) not in (0, PEOPLE) or not all(map(_is_text, answers)):
            raise UserError(f"{place}: found answers {answers!r:.60}, expected a list of {PEOPLE} texts, or none")
        text, image = row["question"], str(row["image_id"])
        if asked is None:
            prompt = f"{text}\n{SHORT}"
        elif (prompt := asked.get((image, text.lower()), "")) == "":
            raise UserError(f"{place}: no prompt of image '{image}' with '{text:.40}' in {self.prompts}")
        files.append(inside(folder / self.images, f"{image}.jpg", place))
        likeliest = tuple(answer for answer, _ in Counter(answers).most_common(1))
        name = str(row.get("question_id", number))
        return Question((with_image(prompt), *likeliest), tuple(answers), number, number, name)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _prompts(file: Path) -> dict[tuple[str, str], str]:
    """Prompts by image and question in small letters."""
    if not file.is_file():
        raise UserError(f"{file}: no such file, expected LLaVA's prompts of TextVQA (data.prompts)")
    found = {}
    for number, row in read_rows(file):
        if not _is_text(text := row.get("text")) or "question_id" not in row:
            raise UserError(f"{file} line {number}: found {row!r:.60}, expected question_id and text")
        found[str(row["question_id"]), text.split("\n")[0].lower()] = text
    return found
