"""Prediction outlasts samples that cannot be read: the others get theirs, and at its end those are named."""

from collections.abc import Iterator
from typing import Any

import numpy as np

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
            lines = self._unreadable(rows.tolist())
        found = [row for row in rows.tolist() if row not in lines]
        others = ([row] for row in range(len(self)) if not self._unreadable([row]))
        if not (found := found or next(others, [])):
            raise UserError(next(iter(lines.values())))
        return {**self.rows.fetch(np.array(found)), UNREADABLE: lines}

    def _unreadable(self, rows: list[int]) -> dict[int, str]:
        """What is wrong with those of some rows that cannot be read."""
        lines = {}
        for row in rows:
            try:
                self.rows.fetch(np.array([row]))
            except UserError as error:
                lines[row] = str(error)
        return lines


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
