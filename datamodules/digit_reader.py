"""Reads clips of moving digits: which digits they show and where these go, to compare with their captions."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import normalize, pad

from penstock.datamodules.moving_digits import SIDE, BouncingDigits, Moves, describe
from penstock.lightning_modules.errors import UserError

Seen = tuple[int, tuple[int, int]]
WAYS = list(product((-1, 0, 1), repeat=2))
PHRASES: dict[str, Seen] = {describe(label, way): (label, way) for label in range(10) for way in WAYS}
INK = 0.2


class DigitReader:
    """Judges clips `(B, T, C, H, W)` by their captions: is every digit that a caption names there, and does it move so?

    A digit that bounces is known from its place and direction in the first frame. Of all tracks the one is taken along
    which the mean of the 8x8 pixels under it has the most energy; the mean is the digit. It is moved, by up to a pixel,
    to where it looks most like a training digit of `MovingDigits` (normalised correlation), and a classifier (RBF
    support vectors) trained on these names it. Where a caption names two digits, the second is looked for in what the
    first leaves free, and the first once more in what the second does. The caption says how many there are, no more.

    Args:
        speed: pixels a frame, that of the data.
    """

    def __init__(self, speed: int = 1):
        self.speed = speed
        self._known: dict[tuple[int, ...], tuple[Tensor, list[tuple[int, int]]]] = {}
        store = BouncingDigits(1, 2 * SIDE, 2 * SIDE, 1, 1, 0)
        images = torch.from_numpy(store.images[store.kept]).flatten(1) / 16.0
        self._templates = normalize(images, dim=1)
        self._classifier = SVC(C=10).fit(images.numpy(), store.labels[store.kept])

    def __call__(self, data: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """Shares of what the captions name, float64 `(B,)` each.

        Args:
            data: clips in [-1, 1].
            captions: as `MovingDigits` writes them.

        Returns:
            `digit`, `direction`, and `""` for digits that move in the direction which is named for them.

        Raises:
            UserError: frames too small for the data, or a caption in other words.
        """
        asked = [understood(caption) for caption in captions]
        seen = self.read(data, [len(items) for items in asked])
        kinds = {"": lambda item: item, "digit": lambda item: item[0], "direction": lambda item: item[1]}
        return {
            name: torch.tensor([_share(map(kind, a), map(kind, s)) for a, s in zip(asked, seen)], dtype=torch.float64)
            for name, kind in kinds.items()
        }

    def read(self, videos: Tensor, counts: list[int]) -> list[list[Seen]]:
        """Class and direction (rows, columns) of the 1 or 2 digits that each clip is taken to show."""
        levels = (videos.detach().float().cpu().mean(2).clamp(-1, 1) + 1) / 2
        places, ways = self._tracks(tuple(levels.shape[1:]))
        return [self._read(clip.flatten(), count, places, ways) for clip, count in zip(levels, counts)]

    def _read(self, clip: Tensor, count: int, places: Tensor, ways: list[tuple[int, int]]) -> list[Seen]:
        taken = [torch.zeros_like(clip, dtype=torch.bool) for _ in range(count)]
        seen: list[Seen] = [(0, (0, 0))] * count
        for k in [*range(count), *range(count - 1)]:
            free = (~torch.stack([*taken[:k], *taken[k + 1 :], torch.zeros_like(taken[k])]).any(0)).float()
            under = free[places].sum(1)
            means = (free * clip)[places].sum(1) / under.clamp(min=1)
            best = int((under * means.square()).sum(1).argmax())
            taken[k] = torch.zeros_like(taken[k])
            taken[k][places[best][:, means[best] > INK]] = True
            seen[k] = (self._class(means[best]), ways[best])
        return seen

    def _class(self, digit: Tensor) -> int:
        """Class of pixels `(64,)`, at the place, up to a pixel away, where they look most like a training digit."""
        wide = pad(digit.view(SIDE, SIDE), (1, 1, 1, 1))
        moved = torch.stack([wide.roll(way, (0, 1))[1:-1, 1:-1].flatten() for way in WAYS])
        best = (moved @ self._templates.T).amax(1).argmax()
        return int(self._classifier.predict(moved[best : best + 1].numpy())[0])

    def _tracks(self, shape: tuple[int, int, int]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Places in a flat clip `(T, H, W)` of the pixels under every track `(n, T, 64)`, and the directions."""
        if shape not in self._known:
            frames, height, width = shape
            if min(height, width) < SIDE + 2 * self.speed:
                raise UserError(
                    f"digits: frames of {height}x{width}, expected sides of {SIDE + 2 * self.speed} or more: digits of "
                    f"{SIDE} pixels that move by {self.speed}"
                )
            starts = product(range(height - SIDE + 1), range(width - SIDE + 1))
            tracks = np.array([(start, way) for start in starts for way in WAYS])
            moves = Moves(np.zeros((len(tracks), 1)), tracks[:, None, 0], self.speed * tracks[:, None, 1])
            corner = BouncingDigits(max(frames, 2), height, width, 1, self.speed, 0).places(moves)[:, 0]
            away = (corner[:, 1] - corner[:, 0] == moves.step[:, 0]).all(1)
            tracks, corner = tracks[away], corner[away, :frames]
            first = np.arange(frames) * height * width + corner[..., 0] * width + corner[..., 1]
            inside = (np.arange(SIDE)[:, None] * width + np.arange(SIDE)).flatten()
            ways = [(int(row), int(column)) for row, column in tracks[:, 1]]
            self._known[shape] = torch.from_numpy(first[..., None] + inside), ways
        return self._known[shape]


def understood(caption: str) -> list[Seen]:
    """Class and direction (rows, columns) of every digit that a caption names.

    Raises:
        UserError: a caption that `MovingDigits` does not write.
    """
    words = caption.split(" and ")
    for cut in range(1, len(words) + 1):
        parts = [" and ".join(part) for part in (words[:cut], words[cut:]) if part]
        if all(part in PHRASES for part in parts):
            return [PHRASES[part] for part in parts]
    raise UserError(f"caption '{caption}': expected one or two like 'a three moves left and down', as in moving_digits")


def _share(asked: Iterable[object], seen: Iterable[object]) -> float:
    asked = Counter(asked)
    return (asked & Counter(seen)).total() / asked.total()
