"""Embedded images with marked defects: scikit-learn's digits, spoiled in known places."""

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from penstock.datamodules.anomaly import sides
from penstock.datamodules.base import fingerprint, halves, held_out
from penstock.datamodules.masked import CLASS_NAMES, MaskedData, anomaly_labels
from penstock.datamodules.one_class import enlarged
from penstock.datamodules.pixels import Pixels
from penstock.lightning_modules.errors import UserError

DEFECTS = ("blot", "gap", "scratch")
LEVELS, SIDE, PATCH = 17, 8, 3


def spoil(digit: np.ndarray, defect: str, rng: np.random.Generator) -> np.ndarray:
    """A digit uint8 `(8, 8)`, levels 0..16, with a defect.

    `blot`: a full square of 3x3 where there is little ink; `gap`: an empty one where there is much; `scratch`: a full
    row or column.
    """
    out = digit.copy()
    if defect == "scratch":
        line = rng.integers(1, SIDE - 1)
        out[(line, slice(None)) if rng.random() < 0.5 else (slice(None), line)] = LEVELS - 1
        return out
    ink = np.lib.stride_tricks.sliding_window_view(digit, (PATCH, PATCH)).sum((2, 3), dtype=np.int64)
    order = np.argsort(ink.ravel() if defect == "blot" else -ink.ravel(), kind="stable")
    row, column = divmod(int(rng.choice(order[:6])), ink.shape[1])
    out[row : row + PATCH, column : column + PATCH] = LEVELS - 1 if defect == "blot" else 0
    return out


class SpoiledStore:
    """Digits as RGB of 256 levels and of one size, with masks of the pixels that a defect changed.

    Args:
        digits: uint8 `(n, 8, 8)`, levels 0..16, spoiled where `changed`.
        changed: bool `(n, 8, 8)`.
        labels: int64 `(n,)`.
        size: height and width.
    """

    def __init__(self, digits: np.ndarray, changed: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> None:
        self.digits, self.changed = (torch.from_numpy(x)[:, None] for x in (digits, changed.astype(np.uint8)))
        self.labels, self.size = torch.from_numpy(labels), size

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        rows = torch.from_numpy(numbers)
        return {"image": enlarged(self.digits[rows], LEVELS, self.size), "label": self.labels[rows]}

    def masks(self, numbers: np.ndarray) -> Tensor:
        """uint8 `(b, 1, H, W)` in {0, 1}."""
        return interpolate(self.changed[torch.from_numpy(numbers)], self.size, mode="nearest-exact")

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""

    warm_masks = warm


class SpoiledDigits(MaskedData):
    """scikit-learn's digits, whole ones to train on, whole and spoiled ones with masks to test on; scaled to [-1, 1].

    Half of the held-out digits are spoiled, each in one way and in a place of its own: `blot`, `gap` or `scratch` (see
    `spoil`). Validation and test have a half of them each, of every kind.

    Args:
        digit: use this digit only; `None` = all ten.
        image_size: side, or [height, width]; images are enlarged from 8x8 (bilinear), masks by the nearest pixel.
        val_fraction: held-out part in (0, 1), the same images for every seed.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; the set lies in memory, 0 is fastest.
        seed: key of the order; `None` = the seed of the run.

    Raises:
        UserError: a size or a digit out of range.
    """

    def __init__(
        self,
        digit: int | None = None,
        image_size: int | tuple[int, int] = 64,
        val_fraction: float = 0.4,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(),
        )
        if digit is not None and not 0 <= digit <= 9:
            raise UserError(f"data.digit: found {digit}, expected 0 .. 9")
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction: found {val_fraction}, expected a number in (0, 1)")
        self.digit, self.size, self.val_fraction = digit, sides(image_size), val_fraction

    def build(self) -> tuple[SpoiledStore, dict[str, np.ndarray]]:
        images, classes = load_digits(return_X_y=True)
        wanted = slice(None) if self.digit is None else classes == self.digit
        whole, self._classes = images.astype(np.uint8).reshape(-1, SIDE, SIDE)[wanted], classes[wanted]
        train, held = held_out(len(whole), self.val_fraction)
        self.defects, self.defect_of = list(DEFECTS), np.full(len(whole), -1, dtype=np.int64)
        _, spoiled = halves(np.zeros(len(held)))
        self.defect_of[held[spoiled]] = np.arange(len(spoiled)) % len(DEFECTS)
        digits = whole.copy()
        for number in np.flatnonzero(self.defect_of >= 0):
            defect = DEFECTS[self.defect_of[number]]
            digits[number] = spoil(whole[number], defect, np.random.default_rng(number))
        one, other = halves(self.defect_of[held])
        self.shape, self.class_names = (3, *self.size), list(CLASS_NAMES)
        self.fingerprint = fingerprint("spoiled_digits", digits, self.defect_of, self.val_fraction, self.shape)
        store = SpoiledStore(digits, digits != whole, anomaly_labels(self.defect_of), self.size)
        return store, {"train": train, "val": held[one], "test": held[other]}

    def where(self, number: int) -> str:
        """Kind, number and digit of an image, `scratch/00012_7`."""
        kind = self.defect_of[number]
        return f"{'good' if kind < 0 else self.defects[kind]}/{number:05d}_{self._classes[number]}"
