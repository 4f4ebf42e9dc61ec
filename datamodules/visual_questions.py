"""Conversations about images: what all sets of questions share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.datamodules.base import KindDataModule, find_folder
from penstock.datamodules.image_sources import Source
from penstock.datamodules.images import centre_square, check_depth, load_upright
from penstock.datamodules.pixels import Pixels
from penstock.lightning_modules.errors import UserError, did_you_mean

Fit = Literal["pad", "crop"]
Rule = Literal["exact", "vqa", "option"]
GREY = (123, 116, 103)  # 255 times ImageNet's mean


class Question(NamedTuple):
    """A conversation about an image.

    Attributes:
        turns: Questions and answers in turn, a question first; an odd number of them ends with a question to answer.
        answers: What is right, to score by; none where it is not known.
        image: Row in the source of images, or None for a text alone.
        group: Number of the question, the same where one is asked in several ways.
        name: For files and messages.
    """

    turns: tuple[str, ...]
    answers: tuple[str, ...] = ()
    image: int | None = None
    group: int = 0
    name: str = ""


class QuestionStore:
    """Conversations with their images, read when they are asked for.

    Args:
        questions: By number.
        source: Of the images.
        side: Of the images, pixels.
        fit: How an image becomes square: `pad` puts it in the middle of its mean colour, `crop` takes its middle.
    """

    def __init__(self, questions: Sequence[Question], source: Source, side: int, fit: Fit) -> None:
        self.questions, self.source, self.side, self.fit = questions, source, side, fit

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        found = [self.questions[number] for number in numbers.tolist()]
        return {
            "image": torch.stack([self._image(question) for question in found]),
            "conversation": [question.turns for question in found],
            "answers": [question.answers for question in found],
            "group": torch.tensor([question.group for question in found]),
        }

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""

    def _image(self, question: Question) -> Tensor:
        if question.image is None:
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8)
        image = load_upright(self.source, question.image)
        check_depth(image, self.source.where(question.image))
        image = image.convert("RGB")
        if self.fit == "pad":
            image = padded(image)
        if image.size != (self.side, self.side):
            image = centre_square(image, self.side)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class VisualQuestions(KindDataModule):
    """Batches have `image` `(B, 3, S, S)` in [-1, 1], `conversation` and `answers`, lists of tuples of texts, `group`
    int64 `(B,)` and `index`.

    Args:
        image_size: S, side of the images, pixels.
        fit: See `QuestionStore`.
        rule: How answers are scored, one of `lightning_modules/answers.py`.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of the order; `None` = the seed of the run.

    Raises:
        UserError: a size below 1.
    """

    def __init__(
        self,
        *,
        image_size: int,
        fit: Fit,
        rule: Rule,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int | None,
    ) -> None:
        if image_size < 1:
            raise UserError(f"data.image_size: found {image_size}, expected at least 1")
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(),
        )
        self.side, self.fit, self.rule = image_size, fit, rule
        self.shape, self.class_names = (3, image_size, image_size), []

    def furnish(self, questions: Sequence[Question], source: Source) -> QuestionStore:
        """The store of all questions."""
        self.questions = questions
        return QuestionStore(questions, source, self.side, self.fit)

    def where(self, number: int) -> str:
        """Name of a question."""
        return self.questions[number].name


def padded(image: Image.Image) -> Image.Image:
    """An RGB image in the middle of a square of ImageNet's mean colour."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def found_folder(name: str, data_dir: str | None, expected: str) -> Path:
    """`data_dir`, or `$PENSTOCK_DATA/<name>`.

    Raises:
        UserError: neither is there; the message says what is `expected` in it.
    """
    if (folder := find_folder(name, data_dir)) is None:
        raise UserError(f"data.data_dir: found none, and no $PENSTOCK_DATA/{name}; expected a folder with {expected}")
    return folder


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: no such file, or none of JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = [path.name for path in file.parent.glob("*.json*")] if file.parent.is_dir() else []
        raise UserError(f"{file}: no such file{did_you_mean(file.name, others)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error


def inside(folder: Path, name: Any, place: str) -> Path:
    """The path of a file in a folder.

    Args:
        folder: Of images.
        name: Of the file, from there.
        place: What names it, for messages.

    Raises:
        UserError: no name, or one that leaves the folder.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"{place}: found {name!r:.40} as image, expected the name of a file in {folder}")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{place}: path '{name}' leaves the data folder {folder}")
    return path
