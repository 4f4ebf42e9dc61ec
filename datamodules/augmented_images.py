"""Images that classifiers are trained on: crops of random size and place, RandAugment (timm's transforms)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor

from penstock.datamodules.base import View
from penstock.datamodules.images import MODE_OF, Images, ImageStore, check_depth
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader
from penstock.lightning_modules.errors import UserError


class AugmentedView(View):
    """Training images, each changed by what (seed, epoch, its number) draw; rows come with the epoch, see `Epochs`.

    Args:
        store: of the images.
        numbers: `(n,)`, of the split.
        transform: PIL image to uint8 `(C, S, S)`.
        seed: of the draws.
    """

    def __init__(self, store: ImageStore, numbers: np.ndarray, transform: Any, seed: int) -> None:
        super().__init__(store, numbers)
        self.transform, self.seed = transform, seed

    def fetch(self, rows: np.ndarray) -> dict[str, Tensor]:
        numbers = self.numbers[rows[0]]
        images = np.stack([self._image(int(n), int(epoch)) for n, epoch in zip(numbers, rows[1])])
        labels = {} if self.store.labels is None else {"label": self.store.labels[torch.from_numpy(numbers)]}
        return {"image": torch.from_numpy(images), **labels, "index": torch.from_numpy(numbers)}

    def _image(self, number: int, epoch: int) -> np.ndarray:
        source, row = self.store.place(number)
        image = self.store.load(source, row)
        check_depth(image, source.where(row))
        with drawing(self.seed, epoch, number):
            return np.asarray(self.transform(image.convert(MODE_OF[self.store.shape[0]])))


class Epochs(KeyedBatchSampler):
    """Rows with the epoch that they are read in, int64 `(2, b)`."""

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch = self.sampler.epoch
        return (np.stack((rows, np.full_like(rows, epoch))) for rows in super().__iter__())


@contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and PyTorch that follow from a key; before and after it they are as they were."""
    words = np.random.SeedSequence(key).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class AugmentedImages(Images):
    """`Images` of another size in every epoch: a part of each is cut out, resized (bicubic) and changed by RandAugment.

    In evaluation they are as `Images` gives them. All draws follow from (seed, epoch, number), so that a resumed run
    sees what it would have seen.

    Args:
        smallest: least part of the area of an image that is cut out, in (0, 1]; its aspect is 3/4 to 4/3.
        policy: timm's description of the changes (arXiv 1909.13719), or null for none.
        more: of `Images`; `image_size` is needed, `dequantise` is not for classifiers.

    Raises:
        UserError: no size, or a value out of range.
    """

    def __init__(self, smallest: float = 0.08, policy: str | None = "rand-m9-mstd0.5-inc1", **more: Any) -> None:
        super().__init__(**more)
        if self.image_size is None:
            raise UserError("data.image_size: found none, expected the side of the images")
        if not 0 < smallest <= 1:
            raise UserError(f"data.smallest: found {smallest}, expected a number in (0, 1]")
        try:
            self.transform = transforms_imagenet_train(
                self.image_size,
                scale=(smallest, 1.0),
                hflip=0.0,
                color_jitter=None,
                auto_augment=policy,
                interpolation="bicubic",
                use_prefetcher=True,
            )
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"data.policy: timm does not know '{policy}' ({error}), expected such as rand-m9"
            ) from error

    def train_dataloader(self) -> KeyedLoader:
        numbers = self.numbers["train"]
        plain = self.train_batches(len(numbers))
        batches = Epochs(plain.sampler, self.batch_size, rank=plain.rank, world=plain.world, drop_last=True)
        return self.loader(AugmentedView(self.store, numbers, self.transform, self.run_seed), batches)
