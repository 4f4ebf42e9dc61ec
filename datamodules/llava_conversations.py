"""Conversations about images in the files that LLaVA is trained on (arXiv 2304.08485)."""

from pathlib import Path
from typing import Any

import numpy as np

from penstock.datamodules.base import fingerprint, held_out
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
from penstock.lightning_modules.nets.conversation import IMAGE, with_image

ROLES = ("human", "gpt")
FORM = '{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What is it?"}, ...]}'


class LlavaConversations(VisualQuestions):
    """A JSON list of `{"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}` and its images.

    `<image>` in a question is where the image is, which then comes first in that question; conversations without
    `image` are texts alone. Answers that come before the first question are left out.

    Args:
        data_dir: folder of the data; `None` = `$PENSTOCK_DATA/llava`.
        file: name of the list in it.
        images: folder in it that names of images start from.
        image_size: side of the images.
        fit: `crop` for captions, `pad` for instructions, as the official recipes.
        val_fraction: share of the conversations held out, for validation and test, in [0, 1).
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of the order; `None` = the seed of the run.

    Raises:
        UserError: a file, a row or an image that is not as described; it is named.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        file: str = "llava_v1_5_mix665k.json",
        images: str = ".",
        image_size: int = 512,
        fit: Fit = "pad",
        val_fraction: float = 0.001,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size,
            fit=fit,
            rule="exact",
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.data_dir, self.file, self.images, self.val_fraction = data_dir, file, images, val_fraction

    def build(self) -> tuple[QuestionStore, dict[str, np.ndarray]]:
        folder = found_folder("llava", self.data_dir, f"{self.file} and its images")
        file = folder / self.file
        rows = read_json(file)
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{file}: found {type(rows).__name__} of no rows, expected a list of rows such as {FORM}")
        files: dict[Path, int] = {}
        questions = [_question(row, n, f"{file} row {n}", folder / self.images, files) for n, row in enumerate(rows)]
        self.fingerprint = fingerprint("llava", [question.turns for question in questions], list(map(str, files)))
        kept, held = held_out(len(questions), self.val_fraction)
        source = FileSource(folder, list(files), None, [])
        return self.furnish(questions, source), {"train": kept, "val": held, "test": np.arange(0)}


def _question(row: Any, number: int, place: str, folder: Path, files: dict[Path, int]) -> Question:
    """A row as a question; `files` are the images so far, with their numbers."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise UserError(f"{place}: found {row!r:.60}, expected {FORM}")
    texts = [_text(turn, place) for turn in row["conversations"]]
    while texts and texts[0][0] == ROLES[1]:
        texts = texts[1:]
    if not texts or len(texts) % 2 or [role for role, _ in texts] != [*ROLES] * (len(texts) // 2):
        found = ", ".join(role for role, _ in texts) or "nothing"
        raise UserError(f"{place}: found turns of {found}, expected human and gpt in turn, gpt last")
    marked = [k for k, (_, text) in enumerate(texts) if IMAGE in text]
    image = row.get("image")
    if len(marked) != (image is not None) or any(k % 2 for k in marked):
        what = "no image" if image is None else f"image '{image}'"
        raise UserError(f"{place}: found {what} and {len(marked)} turns with {IMAGE}, expected one question with both")
    turns = tuple(with_image(text) if IMAGE in text else text for _, text in texts)
    path = None if image is None else inside(folder, image, place)
    name = str(row.get("id", number))
    return Question(turns, turns[-1:], None if path is None else files.setdefault(path, len(files)), number, name)


def _text(turn: Any, place: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
        raise UserError(f"{place}: found turn {turn!r:.60}, expected from human or gpt, with a value")
    return turn["from"], turn["value"]
