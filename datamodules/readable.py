"""Prediction outlasts samples that cannot be read: the others get theirs, and at its end those are named."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.datamodules.sampling import KeyedLoader, Rows
from penstock.lightning_modules.errors import UserError

UNREADABLE = "unreadable"


class Readable:
    """Rows whose batches leave out what cannot be read, and tell it under `unreadable`: a line by row.

    A batch of which nothing can be read holds the first sample of all that can, once more, so that all ranks have
    the same number of batches and none is empty.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        """A batch of at least one sample.

        Raises:
            UserError: no sample of all can be read; of the batch's, the first is named.
        """
        try:
            return self.rows.fetch(rows)
        except UserError:
            samples, lines = self._read(rows.tolist())
        others = (self._read([row])[0] for row in range(len(self)))
        if not (samples := samples or next(filter(None, others), None)):
            raise UserError(next(iter(lines.values())))
        return {**_joined(samples), UNREADABLE: lines}

    def _read(self, rows: list[int]) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """Samples one by one, and what was wrong with the others."""
        samples, lines = [], {}
        for row in rows:
            try:
                samples.append(self.rows.fetch(np.array([row])))
            except UserError as error:
                lines[row] = str(error)
        return samples, lines


class PredictionLoader:
    """A loader that Lightning leaves as it is: for prediction it rebuilds every DataLoader with batches of its own.

    Attributes:
        unreadable: of the batches so far, a line for each row that could not be read.
    """

    def __init__(self, loader: KeyedLoader) -> None:
        self.loader = loader
        self.unreadable: dict[int, str] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            self.unreadable |= batch.pop(UNREADABLE, {})
            yield batch

    def __len__(self) -> int:
        return len(self.loader)


def refusal(lines: dict[int, str]) -> UserError:
    """One line that names all that could not be read; every rank has to raise it.

    Args:
        lines: what was wrong, by row; at least one.
    """
    first, *others = (lines[row] for row in sorted(lines))
    names = ", ".join(line.split(": ")[0] for line in others)
    return UserError(f"{first}{names and f'; nor can be read: {names}'}; all others were predicted", everywhere=True)


def _joined(samples: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {
        key: torch.cat(parts) if isinstance(parts[0], Tensor) else [value for part in parts for value in part]
        for key, parts in columns.items()
    }
