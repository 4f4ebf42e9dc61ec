"""The embedded default for video: hand-written digits that move in a small frame and bounce off its walls."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, fingerprint, held_out
from penstock.datamodules.image_text import NAMES
from penstock.datamodules.pixels import Pixels
from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError

SIDE = 8
HELD_OUT = 0.1
FIRST = {"train": 0, "val": 2**30, "test": 2**31}
ACROSS, DOWN = {-1: "left", 0: "", 1: "right"}, {-1: "up", 0: "", 1: "down"}


def describe(label: int, step: tuple[int, int]) -> str:
    """What one digit does: `a three moves left and down`, `an eight moves up`, `a one stays still`.

    Args:
        label: class, 0..9.
        step: (rows, columns) a frame at the start, each negative, 0 or positive.
    """
    ways = [word for word in (ACROSS[int(np.sign(step[1]))], DOWN[int(np.sign(step[0]))]) if word]
    return f"a{'n' * (label == 8)} {NAMES[label]} {'moves ' + ' and '.join(ways) if ways else 'stays still'}"


@dataclass(frozen=True)
class Moves:
    """What happens in clips `(B,)` of up to two digits.

    Attributes:
        digit: int64 `(B, 2)` number of the picture; -1 = no second digit.
        start: int64 `(B, 2, 2)` (row, column) of the upper left corner in the first frame.
        step: int64 `(B, 2, 2)` pixels a frame at the start, along (rows, columns).
    """

    digit: np.ndarray
    start: np.ndarray
    step: np.ndarray


class BouncingDigits:
    """Clips by number: what a clip shows is a pure function of (seed, number).

    One digit, or with equal chance two, of 8x8 pixels and 17 levels; the brighter digit covers the other. Each takes
    one of eight directions or stays still, with equal chance, and goes on by whole pixels, so that its picture never
    changes; at a wall it turns back. It starts in the half of its range from which the wall it goes to is the farther
    one, so that the first frames show the direction that the caption names. The second digit starts at the place, of
    four drawn, where it overlaps the first least.

    Numbers from 2^30 on show digits that the others never show.

    Args:
        frames: of a clip.
        height: of a frame.
        width: of a frame.
        most_digits: 1 or 2.
        speed: pixels a frame.
        seed: of all clips.
    """

    def __init__(self, frames: int, height: int, width: int, most_digits: Literal[1, 2], speed: int, seed: int) -> None:
        self.frames, self.height, self.width = frames, height, width
        self.most_digits, self.speed, self.seed = most_digits, speed, seed
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = images.astype(np.uint8).reshape(-1, SIDE, SIDE), labels.astype(np.int64)
        self.kept, self.held = held_out(len(images), HELD_OUT)

    def moves(self, numbers: np.ndarray) -> Moves:
        """What happens in clips `numbers` `(B,)`."""
        index = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        u = Draws(self.seed, 0, index).uniform("moving_digits", (15,)).double().numpy()
        train, which = (numbers < FIRST["val"])[:, None], u[:, :2]
        digit = np.where(train, self.kept[_pick(which, len(self.kept))], self.held[_pick(which, len(self.held))])
        digit[u[:, 4] * self.most_digits < 1, 1] = -1
        turn, room = _pick(u[:, 2:4], 9), self._room
        sign = np.stack((turn // 3 - 1, turn % 3 - 1), -1)
        low, high = np.where(sign < 0, -(-room // 2), 0), np.where(sign > 0, room // 2, room)
        tries = low[:, [0, 1, 1, 1, 1]] + _pick(u[:, 5:].reshape(-1, 5, 2), (high - low + 1)[:, [0, 1, 1, 1, 1]])
        overlap = np.clip(SIDE - np.abs(tries[:, 1:] - tries[:, :1]), 0, SIDE).prod(-1)
        start = np.stack((tries[:, 0], tries[np.arange(len(tries)), 1 + overlap.argmin(1)]), 1)
        return Moves(digit, start, sign * self.speed)

    def places(self, moves: Moves) -> np.ndarray:
        """Upper left corners in every frame, int64 `(B, 2, frames, 2)`: straight lines folded at the walls."""
        line = moves.start[:, :, None] + moves.step[:, :, None] * np.arange(self.frames)[:, None]
        return self._room - np.abs(self._room - line % (2 * self._room))

    def video(self, moves: Moves) -> np.ndarray:
        """Grey levels 0..16, uint8 `(B, frames, 1, height, width)`."""
        size, shape = len(moves.digit), (self.frames, self.height, self.width)
        out = np.zeros(size * int(np.prod(shape)), dtype=np.uint8)
        first = np.arange(size * self.frames).reshape(size, self.frames) * (self.height * self.width)
        inside = np.arange(SIDE)[:, None] * self.width + np.arange(SIDE)
        for k, corner in enumerate(self.places(moves).transpose(1, 0, 2, 3)):
            there = moves.digit[:, k] >= 0
            corner, image = corner[there], self.images[moves.digit[there, k]]
            at = (first[there] + corner[..., 0] * self.width + corner[..., 1])[..., None, None] + inside
            out[at] = np.maximum(out[at], image[:, None]) if k else image[:, None]
        return out.reshape(size, self.frames, 1, self.height, self.width)

    def captions(self, moves: Moves) -> list[str]:
        """`a three moves left and a seven moves up`: what each digit of a clip does at the start."""
        labels, steps = self.labels[moves.digit].tolist(), moves.step.tolist()
        known = zip(moves.digit.tolist(), labels, steps)
        return [" and ".join(describe(label, step) for row, label, step in zip(*clip) if row >= 0) for clip in known]

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        moves = self.moves(numbers)
        label = torch.from_numpy(self.labels[moves.digit[:, 0]])
        return {"video": torch.from_numpy(self.video(moves)), "text": self.captions(moves), "label": label}

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""

    @property
    def _room(self) -> np.ndarray:
        return np.array([self.height - SIDE, self.width - SIDE])


class MovingDigits(KindDataModule):
    """Clips `(T, 1, H, W)` of scikit-learn's digits, 17 levels 0..16, scaled to [-1, 1] (x / 8 - 1).

    Batches have `video`, `text`, `label` (class of the first digit) and `index`. Captions read `a three moves left and
    down`, `an eight stays still`, `a three moves left and a seven moves up`: direction at the start, left or right
    before up or down. Clips are made when asked for, whole batches at once, and depend on (`seed`, number) alone.
    Validation and test clips show the tenth of the digits that `Digits` holds out, which no training clip shows; they
    do not depend on `n_train`.

    Args:
        frames: of a clip.
        height: of a frame, at least 8 + 2 `speed`.
        width: of a frame, likewise.
        most_digits: 2 = one digit or two with equal chance; 1 = one.
        speed: pixels a frame along each axis that a digit moves along.
        n_train: training clips, at most 2^30.
        n_val: validation clips.
        n_test: test clips.
        dequantise: add uniform noise of one level to training clips (for likelihoods).
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; 0 is fastest.
        seed: key of the order and of dequantisation; `None` = the seed of the run. The clips themselves depend on it
            only when it is given.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        frames: int = 16,
        height: int = 16,
        width: int = 16,
        most_digits: Literal[1, 2] = 2,
        speed: int = 1,
        n_train: int = 20_000,
        n_val: int = 200,
        n_test: int = 1000,
        dequantise: bool = False,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(levels=17, dequantise=dequantise),
        )
        self.sizes = {"train": n_train, "val": n_val, "test": n_test}
        wanted = {"frames": frames, "speed": speed, **{f"n_{split}": n for split, n in self.sizes.items()}}
        for key, value in wanted.items():
            if not 1 <= value <= 2**30:
                raise UserError(f"data.{key}: found {value}, expected 1 to 2^30")
        for key, value in (("height", height), ("width", width)):
            if value < SIDE + 2 * speed:
                raise UserError(
                    f"data.{key}: found {value}, expected at least {SIDE + 2 * speed}: digits of {SIDE} pixels that "
                    f"move by {speed}"
                )
        if most_digits not in (1, 2):
            raise UserError(f"data.most_digits: found {most_digits}, expected 1 or 2")
        self.options = (frames, height, width, most_digits, speed)

    def build(self) -> tuple[BouncingDigits, dict[str, np.ndarray]]:
        store = BouncingDigits(*self.options, seed=self.seed or 0)
        frames, height, width = self.options[:3]
        self.shape, self.num_classes, self.class_names = (frames, 1, height, width), 10, [str(n) for n in range(10)]
        self.fingerprint = fingerprint(
            "moving_digits", store.images, store.labels, self.options, self.sizes, store.seed, self.pixels
        )
        return store, {split: FIRST[split] + np.arange(n) for split, n in self.sizes.items()}

    def texts(self, rows: Tensor | np.ndarray) -> list[str]:
        """Prompts of any numbers >= 0, one for each of `rows` `(b,)`: the training captions, over and over."""
        return self._captions(self.numbers["train"][torch.as_tensor(rows).cpu().numpy() % self.sizes["train"]])

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], Tensor]:
        """Captions, and classes of the first digit int64 `(n,)`, of the first `n` clips of a split, over and over."""
        numbers = np.resize(self.view(split).numbers, n)
        moves = self.store.moves(numbers)
        return self.store.captions(moves), torch.from_numpy(self.store.labels[moves.digit[:, 0]])

    def _captions(self, numbers: np.ndarray) -> list[str]:
        return self.store.captions(self.store.moves(numbers))


def _pick(u: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Whole numbers 0 .. n-1 from uniform `u` in (0, 1)."""
    return (u * n).astype(np.int64)
