"""Captions without images, for models that learn from their own samples."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, Store, fingerprint, held_out
from penstock.datamodules.prompt_files import read_prompts
from penstock.lightning_modules.errors import UserError


class Captions(KindDataModule):
    """A caption a line of a text file: batches have `text` and `index`.

    Args:
        path: UTF-8 text; empty lines are left out.
        shape: `(C, H, W)` of the images that the model makes.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; None is `batch_size`.
        val_fraction: share of the captions that is held out, for validation and as test.
        num_workers: worker processes a rank.
        seed: of the order; None is that of the run.

    Raises:
        UserError: no path, a file that cannot be read, or a number out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        shape: list[int] | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.02,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        self.path, self.val_fraction, self.class_names = path, val_fraction, []
        if shape is not None:
            self.shape = tuple(shape)

    def build(self) -> tuple[Store, dict[str, np.ndarray]]:
        if self.path is None:
            raise UserError("data.path: found none; expected a text file with a caption a line")
        self.texts = [prompt.text for prompt in read_prompts(Path(self.path).expanduser(), "lines")]
        self.fingerprint = fingerprint("captions", self.texts)
        kept, held = held_out(len(self.texts), self.val_fraction)
        return _Lines(self.texts), {"train": kept, "val": held, "test": np.arange(0)}

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], Tensor | None]:
        """The first `n` captions of a split, over and over; there are no classes."""
        return [self.texts[number] for number in np.resize(self.view(split).numbers, n)], None


class _Lines:
    """The caption of every sample."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        return {"text": [self.texts[number] for number in numbers.tolist()]}

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""
