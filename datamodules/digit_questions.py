"""Embedded questions about pictures of scikit-learn's digits: which digit, how many, which is the largest."""

from typing import Literal, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from penstock.datamodules.base import fingerprint
from penstock.datamodules.digit_scenes import SPLITS, DrawnSource, background, enlarged_ink, shares
from penstock.datamodules.image_text import NAMES
from penstock.datamodules.visual_questions import Question, QuestionStore, VisualQuestions
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import IMAGE, with_image

MOST, LARGER, LEAST, TRIES = 4, 1.4, 0.2, 40
DIM, BRIGHT = 0.4, 0.7
KINDS = ("What digit is shown?", "How many digits are there?", "Which digit is the largest?")


class Drawn(NamedTuple):
    """A picture uint8 `(S, S, 3)`, the numbers of the digits in it, the largest first, and the box of each."""

    picture: np.ndarray
    digits: list[int]
    boxes: list[tuple[int, int, int, int]]


class DigitQuestions(VisualQuestions):
    """A question, or a caption, for each picture of digits; a third of the pictures for each kind of question.

    "What digit is shown?" is of one digit; "How many digits are there?" of one to four; of two to four is "Which digit
    is the largest?", about 1.4 times as high as any other or more. Answers are words, as "seven"; captions tell all
    digits, the largest first, as "a seven and a two". Always giving each question's most frequent answer is right 18
    times in 100.

    Pictures and questions are the same for every seed of a run. Those of training, validation and test show different
    digits: 60, 15 and 25 of a hundred of scikit-learn's 1,797.

    Args:
        pictures: for training; validation and test have a quarter of so many each.
        image_size: side of the pictures, at least 64.
        texts: what goes with a picture.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; the set lies in memory, 0 is fastest.
        seed: key of the order; `None` = the seed of the run.

    Raises:
        UserError: a number of pictures or a size out of range.
    """

    def __init__(
        self,
        pictures: int = 4000,
        image_size: int = 64,
        texts: Literal["questions", "captions"] = "questions",
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        for key, value, least in (("pictures", pictures, 4), ("image_size", image_size, 64)):
            if value < least:
                raise UserError(f"data.{key}: found {value}, expected at least {least}")
        super().__init__(
            image_size=image_size,
            fit="pad",
            rule="exact",
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.texts, self.counts = texts, (pictures, pictures // 4, pictures // 4)

    def build(self) -> tuple[QuestionStore, dict[str, np.ndarray]]:
        inks, labels = load_digits(return_X_y=True)
        inks, drawn, questions = inks.reshape(-1, 8, 8) / 16, [], []
        for stream, (choices, count) in enumerate(zip(shares(len(inks)), self.counts)):
            for n in range(count):
                found = draw_digits(np.random.default_rng((stream, n)), n % len(KINDS), inks, choices, self.side)
                names = [NAMES[labels[digit]] for digit in found.digits]
                turns = _caption(names) if self.texts == "captions" else _question(n % len(KINDS), names)
                name = f"{SPLITS[stream]}/{n + 1:05d}"
                questions.append(Question(turns, turns[1:], len(drawn), len(drawn), name))
                drawn.append(found.picture)
        source = DrawnSource(np.stack(drawn))
        edges = np.cumsum([0, *self.counts])
        self.fingerprint = fingerprint("digit_questions", source.content(), [q.turns for q in questions])
        numbers = {split: np.arange(a, b) for split, a, b in zip(SPLITS, edges, edges[1:])}
        return self.furnish(questions, source), numbers


def draw_digits(rng: np.random.Generator, kind: int, inks: np.ndarray, choices: np.ndarray, side: int) -> Drawn:
    """A picture that a kind of question can be asked of: bright digits on a dim ground.

    Args:
        rng: what is drawn from.
        kind: number in `KINDS`.
        inks: float `(n, 8, 8)` in [0, 1].
        choices: numbers of the digits to choose from.
        side: of the picture in pixels.
    """
    count = 1 if kind == 0 else int(rng.integers(kind, MOST + 1))
    while True:
        canvas, digits, heights = DIM * background(rng, side), rng.choice(choices, count), _heights(rng, kind, count)
        boxes: list[tuple[int, int, int, int]] = []
        for digit, height in zip(digits, heights):
            ink = enlarged_ink(inks[digit], round(height * side), rng)
            if (box := _place(rng, ink.shape, boxes, side)) is None:
                break
            place = canvas[box[1] : box[3], box[0] : box[2]]
            place += ink[..., None] * (rng.uniform(BRIGHT, 1, 3) - place)
            boxes.append(box)
        if len(boxes) == count:
            return Drawn((canvas * 255).round().astype(np.uint8), digits.tolist(), boxes)


def _heights(rng: np.random.Generator, kind: int, count: int) -> list[float]:
    """Shares of the picture's height, the largest first."""
    if kind == 2:
        largest = rng.uniform(0.4, 0.5)
        return [largest, *sorted(rng.uniform(LEAST, largest / LARGER, count - 1).tolist(), reverse=True)]
    if kind == 0:
        return [rng.uniform(0.4, 0.8)]
    return sorted(rng.uniform(LEAST, 0.4, count).tolist(), reverse=True)


def _place(
    rng: np.random.Generator, shape: tuple[int, ...], others: list[tuple[int, int, int, int]], side: int
) -> tuple[int, int, int, int] | None:
    """A box of a digit `(h, w)` beside all others, if it is soon found."""
    height, width = shape
    for _ in range(TRIES):
        x, y = (int(rng.integers(0, side - length + 1)) for length in (width, height))
        if all(x + width <= a or c <= x or y + height <= b or d <= y for a, b, c, d in others):
            return x, y, x + width, y + height
    return None


def _question(kind: int, names: list[str]) -> tuple[str, str]:
    return with_image(KINDS[kind]), NAMES[len(names)] if kind == 1 else names[0]


def _caption(names: list[str]) -> tuple[str, str]:
    return IMAGE, " and ".join(f"{'an' if name == 'eight' else 'a'} {name}" for name in names)
