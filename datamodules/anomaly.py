"""Images of one category to find anomalies in: MVTec AD, VisA, BTAD, and sets of your own in these layouts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.datamodules.anomaly_sources import find_category, load_mask, open_category
from penstock.datamodules.base import find_folder, fingerprint, halves, held_out
from penstock.datamodules.image_sources import FileSource, Source
from penstock.datamodules.images import ImageStore, load_upright
from penstock.datamodules.masked import CLASS_NAMES, MaskedData, anomaly_labels, no_masks
from penstock.datamodules.pixels import TurnedPixels
from penstock.lightning_modules.errors import UserError, did_you_mean

Validation = Literal["test", "half", "good"]


class MaskedImageStore(ImageStore):
    """Image files as RGB of one size, upright (see `load_upright`), their masks beside them.

    Args:
        source: the images.
        labels: int64 `(n,)`.
        masks: `(n,)`, None for normal images.
        height: of images and masks; images are resized with antialiasing (bilinear), masks to the nearest pixel.
        width: likewise.
        in_memory: keep decoded images and masks.
    """

    def __init__(
        self,
        source: FileSource,
        labels: np.ndarray,
        masks: Sequence[Path | None],
        height: int,
        width: int,
        *,
        in_memory: bool,
    ) -> None:
        super().__init__([source], labels, (3, height, width), fit=True, convert=True, in_memory=in_memory)
        self.mask_files = list(masks)
        self.kept_masks: dict[int, Tensor] | None = {} if in_memory else None

    def load(self, source: Source, row: int) -> Image.Image:
        return load_upright(source, row)

    def resized(self, image: Image.Image) -> Image.Image:
        _, height, width = self.shape
        return image.resize((width, height), Image.Resampling.BILINEAR)

    def masks(self, numbers: np.ndarray) -> Tensor:
        """uint8 `(b, 1, H, W)` in {0, 1}."""
        found, kept = no_masks(numbers, *self.shape[1:]), self.kept_masks or {}
        for row, number in enumerate(numbers.tolist()):
            if self.mask_files[number]:
                found[row, 0] = kept[number] if number in kept else self._mask(number)
        return found

    def warm_masks(self, numbers: np.ndarray) -> None:
        """Decodes the masks of `numbers` into memory, where images are kept there."""
        if self.kept_masks is None:
            return
        missing = [n for n in numbers.tolist() if self.mask_files[n] and n not in self.kept_masks]
        with ThreadPoolExecutor() as pool:
            self.kept_masks |= dict(zip(missing, pool.map(self._mask, missing)))

    def _mask(self, number: int) -> Tensor:
        return torch.from_numpy(load_mask(self.mask_files[number], *self.shape[1:]))


class Anomaly(MaskedData):
    """Normal images `(3, H, W)` to train on, normal and anomalous ones with masks to test on, scaled to [-1, 1].

    A folder `data_dir`, or `$PENSTOCK_DATA/<name>`, holds the categories. Each is laid out as in MVTec AD, BTAD or VisA
    (see `anomaly_sources`), which is seen from its folders. Grey images become RGB; all are resized to the size asked
    for, whatever their aspect. They are turned as the orientation in their EXIF data says; a mask is that of the
    turned image. Masks are read in evaluation only.

    Args:
        name: for messages and `$PENSTOCK_DATA`.
        data_dir: folder of the categories.
        category: folder of the category; `None` = `data_dir` is one.
        image_size: side, or [height, width].
        shots: train on so many images only, drawn by the seed; those of a smaller number are among those of a larger.
        val: where validation images come from. `test`: they are the test images, as in public code; what is chosen by
            them is optimistic. `half`: a fixed half of the test images of every kind; the other half is the test.
            `good`: `val_fraction` of the training images; without anomalies, no metric of anomalies is defined.
        val_fraction: part of the training images held out with `val=good`, in (0, 1).
        flip: mirror half of the training images left to right.
        rotate: turn training images by 0, 90, 180 or 270 degrees; for square ones.
        memory_gb: decoded images are kept in memory when all fit in this many GB; 0 = decode in the workers each time.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; 0 is fastest for images in memory.
        seed: key of order, augmentations and shots; `None` = the seed of the run.

    Raises:
        UserError: anything wrong with the data; the file, row or key is named.
    """

    def __init__(
        self,
        name: str = "anomaly",
        data_dir: str | None = None,
        category: str | None = None,
        image_size: int | tuple[int, int] = 256,
        shots: int | None = None,
        val: Validation = "test",
        val_fraction: float = 0.1,
        flip: bool = False,
        rotate: bool = False,
        memory_gb: float = 4.0,
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
            pixels=TurnedPixels(flip=flip, rotate=rotate),
        )
        self.name, self.data_dir, self.category = name, data_dir, category
        self.height, self.width = sides(image_size)
        if rotate and self.height != self.width:
            raise UserError(f"data.rotate: found true with images of {self.height}x{self.width}; expected square ones")
        if val not in get_args(Validation):
            choices = get_args(Validation)
            raise UserError(
                f"data.val: found '{val}', expected one of {', '.join(choices)}{did_you_mean(val, choices)}"
            )
        if shots is not None and shots < 1:
            raise UserError(f"data.shots: found {shots}, expected at least 1")
        if val == "good" and not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction: found {val_fraction}, expected a number in (0, 1) with data.val=good")
        self.shots, self.val, self.val_fraction, self.memory_gb = shots, val, val_fraction, memory_gb
        self.val_is_test = val == "test"

    def build(self) -> tuple[MaskedImageStore, dict[str, np.ndarray]]:
        root = find_folder(self.name, self.data_dir)
        if root is None:
            raise UserError(
                f"data.data_dir: no folder for '{self.name}' (looked for $PENSTOCK_DATA/{self.name}); set "
                "data.data_dir=FOLDER or PENSTOCK_DATA"
            )
        found = open_category(find_category(root, self.category))
        self.files = FileSource(found.folder, [*found.train, *found.test], None, [])
        self.defects, self.defect_of = found.defects, np.append(np.full(len(found.train), -1), found.defect_of)
        numbers = self._split(len(found.train), found.defect_of, found.folder)
        self.shape, self.class_names = (3, self.height, self.width), list(CLASS_NAMES)
        self.fingerprint = fingerprint("anomaly", found.content(), *numbers.values(), (self.shape, self.pixels))
        kept = len(np.unique(np.concatenate(list(numbers.values()))))
        store = MaskedImageStore(
            self.files,
            anomaly_labels(self.defect_of),
            [None] * len(found.train) + found.masks,
            self.height,
            self.width,
            in_memory=kept * 4 * self.height * self.width <= self.memory_gb * 1e9,
        )
        return store, numbers

    def where(self, number: int) -> str:
        """Path of an image from the folder of its category."""
        return self.files.files[number].relative_to(self.files.root).as_posix()

    def _split(self, train_size: int, defect_of: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
        train, test = np.arange(train_size), train_size + np.arange(len(defect_of))
        if self.val == "good":
            train, val = held_out(train_size, self.val_fraction)
        elif not len(test):
            raise UserError(f"{folder}: no test images; expected test/good and test/<defect>, or data.val=good")
        elif self.val == "half":
            one, other = halves(defect_of)
            val, test = test[one], test[other]
        else:
            val = test
        if self.shots is not None:
            if self.shots > len(train):
                raise UserError(f"data.shots: found {self.shots}, expected at most the {len(train)} training images")
            train = np.sort(np.random.default_rng(self.run_seed).permutation(train)[: self.shots])
        return {"train": train, "val": val, "test": test}


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        UserError: one below 1, or not two of them.
    """
    found = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(found) != 2 or min(found) < 1:
        raise UserError(f"data.image_size: found {image_size}, expected a side or [height, width], each at least 1")
    return found
