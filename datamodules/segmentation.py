"""Images with masks of classes: ADE20K, and folders of your own."""

import numpy as np

from penstock.datamodules.base import find_folder, fingerprint, held_out
from penstock.datamodules.segmentation_sources import FilePairs, numbering, open_pairs
from penstock.datamodules.segmented import SegmentedData, SegmentedStore, check_classes
from penstock.lightning_modules.errors import UserError

SPLITS = ("train", "val", "test")


class Segmentation(SegmentedData):
    """Photographs whose pixels have classes; `SegmentedData` says what is in a batch.

    A folder `data_dir`, or `$PENSTOCK_DATA/<name>`, has images and masks in folders of their own, with the same names
    and maybe splits, see `segmentation_sources`. Masks are PNGs of one channel, or of a palette, whose values are
    numbers of classes. Without test images that have masks the validation images serve as test; without validation
    images `val_fraction` of the training images are held out.

    Args:
        classes: names, in the order of their numbers.
        name: for messages and `$PENSTOCK_DATA`.
        data_dir: folder of the data.
        homepage: where the data can be had, for messages.
        images: folder of the images in it.
        masks: folder of the masks.
        mask_suffix: what stands in the name of a mask behind the image's, `_mask` of `a_mask.png`.
        ignore_index: value of pixels that count for nothing.
        reduce_zero_label: 0 is one more such value, and classes are numbered from 1, as in ADE20K.
        min_size: shorter side of resized images.
        max_size: the longer side is at most this; the aspect is kept.
        crop_size: side of training images.
        ratio: least and largest factor of resized images in training.
        cat_max_ratio: crops of which one class has this share or more are drawn again, ten times at most.
        flip: mirror half of the training images left to right.
        distort: change brightness, contrast, saturation and hue of training images.
        val_fraction: part of the training images held out, in [0, 1), where the set has no validation images.
        memory_gb: decoded images are kept in memory when all fit in this many GB; 0 = decode in the workers each time.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of order and crops; `None` = the seed of the run.

    Raises:
        UserError: anything wrong with the data; the file or key is named.
    """

    def __init__(
        self,
        classes: list[str],
        name: str = "segmentation",
        data_dir: str | None = None,
        homepage: str | None = None,
        images: str = "images",
        masks: str = "annotations",
        mask_suffix: str = "",
        ignore_index: int = 255,
        reduce_zero_label: bool = False,
        min_size: int = 512,
        max_size: int = 2048,
        crop_size: int = 512,
        ratio: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        flip: bool = True,
        distort: bool = True,
        val_fraction: float = 0.0,
        memory_gb: float = 4.0,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            min_size=min_size,
            max_size=max_size,
            crop_size=crop_size,
            ratio=ratio,
            cat_max_ratio=cat_max_ratio,
            flip=flip,
            distort=distort,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_classes(len(classes))
        self.classes, self.name, self.data_dir, self.homepage = list(classes), name, data_dir, homepage
        self.images, self.masks, self.mask_suffix = images, masks, mask_suffix
        self.table = numbering(len(classes), ignore_index, reduce_zero_label)
        self.val_fraction, self.memory_gb = val_fraction, memory_gb

    def build(self) -> tuple[SegmentedStore, dict[str, np.ndarray]]:
        root = find_folder(self.name, self.data_dir)
        if root is None:
            got = f"; it can be had at {self.homepage}" if self.homepage else ""
            raise UserError(
                f"data.data_dir: no folder for '{self.name}' (looked for $PENSTOCK_DATA/{self.name}); set "
                f"data.data_dir=FOLDER or PENSTOCK_DATA to one with {self.images}/ and {self.masks}/{got}"
            )
        parts = open_pairs(root, self.images, self.masks, self.mask_suffix)
        edges = np.cumsum([0, *(len(part.images) for part in parts.values())])
        numbers = {split: np.arange(0) for split in SPLITS}
        numbers |= {split: np.arange(a, b) for split, a, b in zip(parts, edges, edges[1:])}
        if self.val_fraction:
            if len(numbers["val"]):
                raise UserError(f"data.val_fraction: '{self.name}' has validation images of its own; expected 0")
            kept, held = held_out(len(numbers["train"]), self.val_fraction)
            numbers["train"], numbers["val"] = numbers["train"][kept], numbers["train"][held]
        images, masks = (
            [file for part in parts.values() for file in getattr(part, key)] for key in ("images", "masks")
        )
        source = FilePairs(root, images, masks, self.table)
        self.num_classes, self.class_names = len(self.classes), self.classes
        self.fingerprint = fingerprint(
            "segmentation",
            *source.content(),
            *numbers.values(),
            self.table,
            (self.classes, self.resizing, self.cropping),
        )
        in_memory = self.memory_gb > 0 and 4 * source.pixels() <= self.memory_gb * 1e9
        return self.furnish(source, in_memory), numbers
