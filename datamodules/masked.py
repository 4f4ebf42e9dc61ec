"""Data whose evaluation batches have masks of what is not normal, and whose training batches do not."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, Store, View
from penstock.datamodules.sampling import KeyedLoader

CLASS_NAMES = ("normal", "anomalous")


class MaskedStore(Store, Protocol):
    """Samples with masks, which are read only when they are asked for."""

    def masks(self, numbers: np.ndarray) -> Tensor:
        """uint8 `(b, 1, H, W)` in {0, 1}, all zero for normal samples."""

    def warm_masks(self, numbers: np.ndarray) -> None: ...


class WithMasks:
    """A store as evaluation sees it."""

    def __init__(self, store: MaskedStore) -> None:
        self.store = store

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        return {**self.store.fetch(numbers), "mask": self.store.masks(numbers)}

    def warm(self, numbers: np.ndarray) -> None:
        self.store.warm(numbers)
        self.store.warm_masks(numbers)


class MaskedData(KindDataModule):
    """Images to find anomalies in. `build` returns a `MaskedStore`.

    Batches have `image`, `label` (0 normal, 1 anomalous), `index`; all but training batches have `mask`. A detector
    is not conditioned on classes: `num_classes` is 0.

    Attributes:
        defects: names of the kinds of anomalies; after `setup`, as what follows.
        defect_of: int64 `(n,)`, by number: place in `defects`, -1 for normal images.
        val_is_test: whether the validation images are the test images.
    """

    defects: list[str]
    defect_of: np.ndarray
    val_is_test: bool = False

    def where(self, number: int) -> str:
        """Name of a sample: a path without its root, one of its own for each."""
        raise NotImplementedError

    def view(self, split: Split) -> View:
        """The samples of one split with their masks."""
        numbers = super().view(split).numbers
        store = WithMasks(self.store)
        store.warm(numbers)
        return View(store, numbers)

    def train_dataloader(self) -> KeyedLoader:
        return self.loader(super().view("train"), self.train_batches(len(self.numbers["train"])))


def anomaly_labels(defect_of: np.ndarray) -> np.ndarray:
    """int64 `(n,)`: 0 for normal samples, 1 for the others."""
    return (defect_of >= 0).astype(np.int64)


def no_masks(numbers: np.ndarray, height: int, width: int) -> Tensor:
    """Masks of normal samples, uint8 `(b, 1, H, W)`."""
    return torch.zeros(len(numbers), 1, height, width, dtype=torch.uint8)
