"""Data whose samples are images of any size with a class for every pixel."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.datamodules.base import KindDataModule, Split, View
from penstock.datamodules.detection_transforms import Resizing, padded, resized, without_padding
from penstock.datamodules.pixels import Pixels
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader, KeyedSampler
from penstock.datamodules.segmentation_transforms import Cropping, cropped
from penstock.lightning_modules.class_masks import IGNORED
from penstock.lightning_modules.errors import UserError

SALT = 3  # of the crops' random numbers, beside the order's


class PairSource(Protocol):
    """Images with their masks under one numbering."""

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """Name of a pair, one of its own for each."""

    def pair(self, row: int) -> tuple[Tensor, Tensor]:
        """uint8 `(3, H, W)` and `(H, W)`, classes or `IGNORED`; raises UserError."""


class SegmentedStore:
    """Images with masks of a source.

    Args:
        source: of the pairs.
        resizing: to the size that evaluation sees.
        cropping: what training makes of it.
        in_memory: keep decoded pairs.
    """

    def __init__(self, source: PairSource, resizing: Resizing, cropping: Cropping, *, in_memory: bool) -> None:
        self.source, self.resizing, self.cropping = source, resizing, cropping
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if in_memory else None

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        """Samples as evaluation sees them: whole images, masks of their original sizes."""
        images, masks = zip(*(self._pair(number) for number in numbers.tolist()))
        originals = [tuple(mask.shape) for mask in masks]
        images = [resized(image, self.resizing.size(*size)) for image, size in zip(images, originals)]
        height, width = (max(sides) for sides in zip(*originals))
        beside = [(0, width - w, 0, height - h) for h, w in originals]
        return {
            "image": padded(images, 1),
            "size": torch.tensor([image.shape[1:] for image in images]),
            "original_size": torch.tensor(originals),
            "mask": torch.stack([F.pad(mask, own, value=IGNORED) for mask, own in zip(masks, beside)]),
        }

    def drawn(self, numbers: np.ndarray, seed: int, epoch: int) -> dict[str, Any]:
        """Samples as training sees them: squares that depend on (seed, epoch, number) alone."""
        images, masks, sizes = [], [], []
        for number in numbers.tolist():
            rng = np.random.default_rng((seed, epoch, number, SALT))
            image, mask, size = cropped(*self._pair(number), self.resizing, self.cropping, rng)
            images.append(image)
            masks.append(mask)
            sizes.append(size)
        return {"image": torch.stack(images), "size": torch.tensor(sizes), "mask": torch.stack(masks)}

    def warm(self, numbers: np.ndarray) -> None:
        """Decodes `numbers` into memory, where pairs are kept there."""
        if self.kept is None:
            return
        missing = [number for number in numbers.tolist() if number not in self.kept]
        with ThreadPoolExecutor() as pool:
            self.kept |= dict(zip(missing, pool.map(self.source.pair, missing)))

    def _pair(self, number: int) -> tuple[Tensor, Tensor]:
        return self.kept[number] if self.kept and number in self.kept else self.source.pair(number)


class EpochBatchSampler(KeyedBatchSampler):
    """Tells the epoch beside the rows: workers that outlast it do not know it. Yields int64 `(2, b)`."""

    def __init__(self, sampler: KeyedSampler, batch_size: int, *, rank: int, world: int) -> None:
        super().__init__(sampler, batch_size, rank=rank, world=world, drop_last=True)

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch = self.sampler.epoch
        return (np.stack((rows, np.full_like(rows, epoch))) for rows in super().__iter__())


class CroppedView(View):
    """A view that reads what `EpochBatchSampler` yields."""

    def __init__(self, store: SegmentedStore, numbers: np.ndarray, seed: int) -> None:
        super().__init__(store, numbers)
        self.seed = seed

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        numbers = self.numbers[rows[0]]
        return {**self.store.drawn(numbers, self.seed, int(rows[1, 0])), "index": torch.from_numpy(numbers)}


class SegmentedData(KindDataModule):
    """Images whose pixels are classified. A subclass has `build`, which sets the attributes of the contract but
    `shape`, and returns what `furnish` makes of a source.

    Batches have

    - `image`: float32 `(B, 3, H, W)` in [-1, 1], 0 at the right and bottom where an image is smaller than the batch;
    - `size`: int64 `(B, 2)`, height and width of what is image in it;
    - `mask`: uint8, the class of each pixel, or `IGNORED`: of ones that count for nothing, and beside an image;
    - `index`: int64 `(B,)`.

    In training they are squares, cut as `Cropping` says, and masks are `(B, H, W)`. In evaluation images are whole and
    resized by their shorter side; masks are as they lie, `(B, H', W')`, and `original_size` `(B, 2)` is their size.

    Args:
        min_size: shorter side of resized images.
        max_size: the longer side is at most this; the aspect is kept.
        crop_size: see `Cropping`, as of what follows.
        ratio: likewise.
        cat_max_ratio: likewise, `most`.
        flip: likewise.
        distort: likewise.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of order and crops; `None` = the seed of the run.

    Raises:
        UserError: a value out of range.
    """

    store: SegmentedStore | None

    def __init__(
        self,
        *,
        min_size: int,
        max_size: int,
        crop_size: int,
        ratio: tuple[float, float],
        cat_max_ratio: float,
        flip: bool,
        distort: bool,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int | None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed, pixels=Pixels()
        )
        self.resizing = Resizing((min_size,), max_size)
        self.cropping = Cropping(crop_size, tuple(ratio), cat_max_ratio, flip, distort)

    def furnish(self, source: PairSource, in_memory: bool) -> SegmentedStore:
        """The store of a source; sets `shape`, that of a training image."""
        self.shape = (3, self.cropping.side, self.cropping.side)
        return SegmentedStore(source, self.resizing, self.cropping, in_memory=in_memory)

    @property
    def augments(self) -> bool:
        return True

    @property
    def val_is_test(self) -> bool:
        """Whether the validation images serve as test images; after `setup`."""
        return not len(self.numbers["test"])

    def where(self, number: int) -> str:
        """Name of a sample: a path without its root, one of its own for each."""
        return self.store.source.where(number)

    def train_dataloader(self) -> KeyedLoader:
        view = self.view("train")
        plain = self.train_batches(len(view))
        batches = EpochBatchSampler(plain.sampler, self.batch_size, rank=plain.rank, world=plain.world)
        return self.loader(CroppedView(self.store, view.numbers, self.run_seed), batches)

    def reference_dataloader(self, split: Split = "train") -> KeyedLoader:
        view = self.view(split)
        return self.loader(view, self.eval_batches(len(view)), partial(_scaled, pixels=self.pixels))

    def finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `image` in [-1, 1], 0 in the padding. A scaled batch is left alone."""
        return _scaled(batch, self.pixels)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self.finished(batch)


def check_classes(num_classes: int) -> None:
    """Refuses numbers of classes that masks of 8 bits do not hold.

    Raises:
        UserError: so it is.
    """
    if not 2 <= num_classes <= IGNORED:
        raise UserError(f"data.classes: found {num_classes} names, expected 2 to {IGNORED}")


def _scaled(batch: dict[str, Any], pixels: Pixels) -> dict[str, Any]:
    image = batch["image"]
    if image.is_floating_point():
        return batch
    return {**batch, "image": pixels.scale(image).mul_(without_padding(image, batch["size"]))}
