"""Data whose samples are images of any size with lists of boxes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import ImageOps
from torch import Tensor

from penstock.datamodules.annotations import Annotations
from penstock.datamodules.base import KindDataModule, Split, View
from penstock.datamodules.detection_transforms import (
    Resizing,
    padded,
    resized,
    transformed,
    transformed_masks,
    without_padding,
)
from penstock.datamodules.image_sources import Source
from penstock.datamodules.images import load_image
from penstock.datamodules.pixels import Pixels
from penstock.datamodules.sampling import BucketedBatchSampler, KeyedLoader, KeyedSampler
from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import decoded

LISTS = ("boxes", "label", "masks")
SIZES = ("size", "original_size")


class BoxedStore:
    """Images as RGB with the boxes of a table.

    Args:
        table: of all images.
        source: the images, in the order of the table.
        resizing: their sizes.
        pad_multiple: sides of a batch are multiples of it.
        in_memory: keep decoded images: resized where there is one size only, else as they are.
    """

    def __init__(
        self, table: Annotations, source: Source, resizing: Resizing, pad_multiple: int, *, in_memory: bool
    ) -> None:
        self.table, self.source, self.resizing, self.pad_multiple = table, source, resizing, pad_multiple
        self.kept: dict[int, Tensor] | None = {} if in_memory else None

    def fetch(
        self, numbers: np.ndarray, which: np.ndarray | None = None, mirrored: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Samples as evaluation sees them, or each with the side `which` `(b,)`, mirrored where `mirrored` `(b,)`."""
        which = np.full(len(numbers), -1) if which is None else which
        mirrored = np.zeros(len(numbers), dtype=bool) if mirrored is None else mirrored
        samples = [self._sample(*row) for row in zip(numbers.tolist(), which.tolist(), mirrored.tolist())]
        images, boxes, labels, masks = map(list, zip(*samples))
        return {
            "image": padded(images, self.pad_multiple),
            "size": torch.tensor([image.shape[1:] for image in images]),
            "original_size": torch.from_numpy(self.table.sizes[numbers]),
            "boxes": boxes,
            "label": labels,
            **({} if self.table.masks is None else {"masks": masks}),
        }

    def warm(self, numbers: np.ndarray) -> None:
        """Decodes `numbers` into memory, where images are kept there."""
        if self.kept is None:
            return
        missing = [number for number in numbers.tolist() if number not in self.kept]
        with ThreadPoolExecutor() as pool:
            self.kept |= dict(zip(missing, pool.map(self._read, missing)))

    def decode(self, number: int) -> Tensor:
        """One image, uint8 `(3, H, W)` of the size that the table says.

        An image whose EXIF data turn it has the size of the table either as it lies in the file or as it is shown.

        Raises:
            UserError: unreadable, truncated, more than 8 bits a channel, of another size; the image is named.
        """
        image, (height, width) = load_image(self.source, number), self.table.sizes[number]
        if image.mode[0] in "IF":
            raise UserError(f"{self.source.where(number)}: found {image.mode} pixels, expected 8 bits a channel")
        if image.size != (width, height):
            image = ImageOps.exif_transpose(image)
        if image.size != (width, height):
            raise UserError(
                f"{self.source.where(number)}: found {image.width}x{image.height} pixels, but its annotations are of "
                f"{width}x{height}; expected the image that was annotated"
            )
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

    def _read(self, number: int) -> Tensor:
        """An image as it is kept."""
        image = self.decode(number)
        if len(self.resizing.sides) > 1:
            return image
        return resized(image, self.resizing.size(*image.shape[1:]))

    def _sample(self, number: int, which: int, mirrored: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        image = self.kept[number] if self.kept and number in self.kept else self._read(number)
        rows = self.table.rows(number)
        trained = ~self.table.crowd[rows]
        boxes = torch.from_numpy(self.table.boxes[rows][trained].astype(np.float32))
        original = tuple(self.table.sizes[number].tolist())
        size, masks = self.resizing.size(*original, which), None
        image, boxes = transformed(image, boxes, size, original, mirrored)
        if self.table.masks is not None:
            masks = transformed_masks(decoded(self.table.masks[rows][trained], original), size, mirrored)
        return image, boxes, torch.from_numpy(self.table.classes[rows][trained]), masks


class AugmentedBatchSampler(BucketedBatchSampler):
    """Adds to rows which of `sides` sides an image has and whether it is mirrored, keyed by (seed, epoch, number).

    Yields int64 `(3, b)`.

    Args:
        numbers: `(n,)`, of the rows.
        sides: how many sides there are.
        flip: mirror half of the images.
    """

    def __init__(
        self,
        sampler: KeyedSampler,
        batch_size: int,
        *,
        numbers: np.ndarray,
        buckets: np.ndarray,
        sides: int,
        flip: bool,
        rank: int,
        world: int,
    ) -> None:
        super().__init__(sampler, batch_size, buckets=buckets, rank=rank, world=world, drop_last=True)
        self.numbers, self.sides, self.flip = numbers, sides, flip

    def __iter__(self) -> Iterator[np.ndarray]:
        seed, epoch = self.sampler.seed, self.sampler.epoch
        for rows in super().__iter__():
            draws = Draws(seed, epoch, torch.from_numpy(self.numbers[rows]))
            which = (draws.uniform("side") * self.sides).long().numpy()
            mirrored = (draws.uniform("flip") < 0.5 * self.flip).numpy()
            yield np.stack((rows, which, mirrored))


class TrainingView(View):
    """A view that reads the rows of `AugmentedBatchSampler`."""

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        numbers = self.numbers[rows[0]]
        found = self.store.fetch(numbers, rows[1], rows[2].astype(bool))
        return {**found, "index": torch.from_numpy(numbers)}


class BoxedData(KindDataModule):
    """Images to find objects in. A subclass has `build`, which ends with `furnish`, and `where`.

    Batches have

    - `image`: float32 `(B, 3, H, W)` in [-1, 1], 0 at the right and bottom where an image is smaller than the batch,
      whose sides are the largest ones, rounded up to a multiple of `pad_multiple`;
    - `size`, `original_size`: int64 `(B, 2)`, height and width of the resized image and of the image itself, which stay
      on the CPU, where shapes are asked for;
    - `boxes`: a list of float32 `(n, 4)`, x1 y1 x2 y2 in pixels of the resized image, x2 - x1 is the width;
    - `label`: a list of int64 `(n,)`, classes of the boxes;
    - `masks`: of data that read them, a list of uint8 `(n, h, w)` in {0, 1}, of the resized image;
    - `index`: int64 `(B,)`.

    Crowds are not among the boxes; `targets` has them. Training batches are in an order of (seed, epoch), the
    incomplete last one is left out. With `group_aspects` all images of a training batch are wide (or square), or all
    are tall, and the incomplete last one of each kind is left out; where a kind does not fill a batch, they come mixed.

    Args:
        min_size: shorter side of resized images; of several, one is drawn for each training image, and evaluation
            takes the last.
        max_size: the longer side is at most this; the aspect is kept.
        pad_multiple: sides of a batch are multiples of it.
        flip: mirror half of the training images.
        group_aspects: see above.
        keep_empty: train on images without boxes, too.
        memory_gb: decoded images are kept in memory when all fit in this many GB.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of order and augmentations; `None` = the seed of the run.

    Attributes:
        category_ids: id of each class in the annotations; after `setup`.

    Raises:
        UserError: a size out of range.
    """

    category_ids: list[int]
    store: BoxedStore | None

    def __init__(
        self,
        *,
        min_size: int | list[int],
        max_size: int,
        pad_multiple: int,
        flip: bool,
        group_aspects: bool,
        keep_empty: bool,
        memory_gb: float,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int | None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(flip=flip),
        )
        if pad_multiple < 1:
            raise UserError(f"data.pad_multiple: found {pad_multiple}, expected at least 1")
        self.resizing = Resizing(tuple([min_size] if isinstance(min_size, int) else min_size), max_size)
        self.pad_multiple, self.group_aspects, self.keep_empty = pad_multiple, group_aspects, keep_empty
        self.memory_gb = memory_gb

    def furnish(
        self, table: Annotations, source: Source, numbers: dict[str, np.ndarray]
    ) -> tuple[BoxedStore, dict[str, np.ndarray]]:
        """What `build` returns; sets `shape`, that of a wide image of the largest size.

        A split of images without boxes is warned of.

        Raises:
            UserError: no image to train on.
        """
        if not self.keep_empty:
            numbers = {**numbers, "train": numbers["train"][table.filled()[numbers["train"]]]}
        if not len(numbers["train"]):
            raise UserError(
                f"{type(self).__name__}: no training image has a box of {', '.join(self.class_names)}; expected some, "
                "or data.keep_empty=true"
            )
        for split in ("val", "test"):
            if len(numbers[split]) and not table.filled()[numbers[split]].any():
                rank_zero_warn(
                    f"{type(self).__name__}: none of the {len(numbers[split])} {split} images has a box of "
                    f"{', '.join(self.class_names)}; their average precision, ap, is not defined and will not be logged"
                )
        sides = (self.resizing.sides[-1], self.resizing.longest)
        self.shape = (3, *(-(-side // self.pad_multiple) * self.pad_multiple for side in sides))
        self.num_classes = len(self.class_names)
        sizes = table.sizes[np.unique(np.concatenate(list(numbers.values())))].tolist()
        if len(self.resizing.sides) == 1:
            sizes = [self.resizing.size(*size) for size in sizes]
        in_memory = sum(3 * height * width for height, width in sizes) <= self.memory_gb * 1e9
        return BoxedStore(table, source, self.resizing, self.pad_multiple, in_memory=in_memory), numbers

    @property
    def val_is_test(self) -> bool:
        """Whether the validation images serve as test images; after `setup`."""
        return not len(self.numbers["test"])

    def where(self, number: int) -> str:
        """Name of a sample: a path without its root, one of its own for each."""
        raise NotImplementedError

    def entry(self, number: int) -> tuple[int, str]:
        """Id and file name of an image in its annotations."""
        return int(self.store.table.image_ids[number]), self.where(number)

    def targets(self, numbers: Tensor | np.ndarray) -> list[dict[str, Any]]:
        """What evaluation compares predictions with, crowds among it.

        Args:
            numbers: `(b,)` of samples, the `index` of a batch.

        Returns:
            For each: `boxes` float32 `(n, 4)` x1 y1 x2 y2 in pixels of the image itself, `labels` int64 `(n,)`,
            `iscrowd` int64 `(n,)` in {0, 1}, `area` float32 `(n,)`, `image_id` int64 `()`; of data with masks also
            `masks`, a list of n run lengths.
        """
        table, found = self.store.table, []
        for number in torch.as_tensor(numbers).tolist():
            rows = table.rows(number)
            found.append(
                {
                    "boxes": torch.from_numpy(table.boxes[rows].astype(np.float32)),
                    "labels": torch.from_numpy(table.classes[rows]),
                    "iscrowd": torch.from_numpy(table.crowd[rows].astype(np.int64)),
                    "area": torch.from_numpy(table.areas[rows].astype(np.float32)),
                    "image_id": torch.tensor(int(table.image_ids[number])),
                }
            )
            if table.masks is not None:
                found[-1]["masks"] = list(table.masks[rows])
        return found

    def train_dataloader(self) -> KeyedLoader:
        view = self.view("train")
        plain = self.train_batches(len(view))
        batches = AugmentedBatchSampler(
            plain.sampler,
            self.batch_size,
            numbers=view.numbers,
            buckets=self._aspects(view.numbers),
            sides=len(self.resizing.sides),
            flip=self.pixels.flip,
            rank=plain.rank,
            world=plain.world,
        )
        return self.loader(TrainingView(self.store, view.numbers), batches)

    def reference_dataloader(self, split: Split = "train") -> KeyedLoader:
        view = self.view(split)
        return self.loader(view, self.eval_batches(len(view)), partial(_scaled, pixels=self.pixels))

    def finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `image` in [-1, 1], 0 in the padding. A scaled batch is left alone."""
        return _scaled(batch, self.pixels)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        """Moves a batch, every list of tensors in one go, but for sizes."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        lists = {key: _moved(moved[key], device) for key in LISTS if key in moved}
        return {**moved, **lists, **{key: batch[key] for key in SIZES}}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self.finished(batch)

    def _aspects(self, numbers: np.ndarray) -> np.ndarray:
        """`(n,)`: 0 for wide and square images, 1 for tall ones; 0 for all where a kind does not fill a batch."""
        tall = self.store.table.sizes[numbers, 0] > self.store.table.sizes[numbers, 1]
        counts = np.bincount(tall, minlength=2)
        return tall * (self.group_aspects and min(counts) >= self.batch_size)


def _scaled(batch: dict[str, Any], pixels: Pixels) -> dict[str, Any]:
    image = batch["image"]
    if image.is_floating_point():
        return batch
    return {**batch, "image": pixels.scale(image).mul_(without_padding(image, batch["size"]))}


def _moved(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    if all(part.device == device for part in parts):
        return parts
    return list(torch.cat(parts).to(device, non_blocking=True).split([len(part) for part in parts]))
