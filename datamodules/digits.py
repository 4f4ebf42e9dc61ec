"""The embedded default: scikit-learn's hand-written digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from penstock.datamodules.base import KindDataModule, TensorStore, fingerprint, held_out
from penstock.datamodules.pixels import Pixels


class Digits(KindDataModule):
    """1,797 grey images `(1, 8, 8)` of ten classes, 17 levels 0..16, scaled to [-1, 1] (x / 8 - 1).

    scikit-learn ships one set (the test half of UCI "Optical Recognition of Handwritten Digits", Alpaydin and Kaynak
    1998); its held-out part serves validation and test.

    Args:
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; the set lies in memory, 0 is fastest.
        seed: key of the order and of dequantisation; `None` = the seed of the run.
        val_fraction: held-out part in [0, 1), the same images for every seed; 0 = no validation.
        dequantise: add uniform noise of one level to training images (for likelihoods).
    """

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        val_fraction: float = 0.1,
        dequantise: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(levels=17, dequantise=dequantise),
        )
        self.val_fraction = val_fraction

    def build(self) -> tuple[TensorStore, dict[str, np.ndarray]]:
        images, labels = load_digits(return_X_y=True)
        images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
        kept, held = held_out(len(images), self.val_fraction)
        self.shape, self.num_classes, self.class_names = (1, 8, 8), 10, [str(n) for n in range(10)]
        self.fingerprint = fingerprint("digits", images, labels, self.val_fraction, self.pixels)
        store = TensorStore(image=torch.from_numpy(images), label=torch.from_numpy(labels.astype(np.int64)))
        return store, {"train": kept, "val": held, "test": held[:0]}
