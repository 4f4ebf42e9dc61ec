"""Images with boxes of objects: COCO, Pascal VOC, and sets of your own in these layouts."""

import numpy as np

from penstock.datamodules.annotations import joined, with_classes
from penstock.datamodules.base import find_folder, fingerprint, held_out
from penstock.datamodules.boxed import BoxedData, BoxedStore
from penstock.datamodules.detection_sources import EXPECTED, open_boxed
from penstock.datamodules.image_sources import FileSource
from penstock.lightning_modules.errors import UserError


class Detection(BoxedData):
    """Photographs with boxes, for object detectors; `BoxedData` says what is in a batch.

    A folder `data_dir`, or `$PENSTOCK_DATA/<name>`, is laid out as COCO or as Pascal VOC (see `detection_sources`),
    which is seen from its folders. Images are resized by their shorter side, the aspect kept; boxes that stick out of
    their image are cut at its edges. Without annotated test images (COCO, VOC from 2008 on keep theirs back) the
    validation images serve as test; without validation images `val_fraction` of the training images are held out.

    Args:
        name: for messages and `$PENSTOCK_DATA`.
        data_dir: folder of the data.
        homepage: where the data can be had, for messages.
        classes: keep these classes only, numbered in this order; or new names, each with the old ones that are joined
            in it; `None` = all, by ascending id.
        min_size: shorter side of resized images; of several, one is drawn for each training image, and evaluation
            takes the last.
        max_size: the longer side is at most this; the aspect is kept.
        pad_multiple: sides of a batch are multiples of it.
        flip: mirror half of the training images left to right.
        group_aspects: a training batch has wide images only, or tall ones only.
        keep_empty: train on images without boxes, too.
        masks: read masks of the objects, too, from COCO's layout.
        trainval: train on the validation images too, as Pascal VOC's protocol has it; the set needs test images of its
            own then, and nothing is left to validate on unless `val_fraction` holds some out.
        val_fraction: part of the training images held out, in [0, 1), where the set has no validation images.
        memory_gb: decoded images are kept in memory when all fit in this many GB; 0 = decode in the workers each time.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of order and augmentations; `None` = the seed of the run.

    Raises:
        UserError: anything wrong with the data; the file, entry or key is named.
    """

    def __init__(
        self,
        name: str = "detection",
        data_dir: str | None = None,
        homepage: str | None = None,
        classes: list[str] | dict[str, list[str]] | None = None,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        pad_multiple: int = 32,
        flip: bool = True,
        group_aspects: bool = True,
        keep_empty: bool = False,
        masks: bool = False,
        trainval: bool = False,
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
            pad_multiple=pad_multiple,
            flip=flip,
            group_aspects=group_aspects,
            keep_empty=keep_empty,
            memory_gb=memory_gb,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.name, self.data_dir, self.homepage = name, data_dir, homepage
        self.classes, self.trainval, self.val_fraction = classes, trainval, val_fraction
        self.masks = masks

    def build(self) -> tuple[BoxedStore, dict[str, np.ndarray]]:
        root = find_folder(self.name, self.data_dir)
        if root is None:
            got = f"; it can be had at {self.homepage}" if self.homepage else ""
            raise UserError(
                f"data.data_dir: no folder for '{self.name}' (looked for $PENSTOCK_DATA/{self.name}); set "
                f"data.data_dir=FOLDER or PENSTOCK_DATA to one with {EXPECTED}{got}"
            )
        found = open_boxed(root, self.masks)
        parts = list(found.splits.values())
        table, self.class_names, self.category_ids = (
            joined([p.table for p in parts]),
            found.class_names,
            found.category_ids,
        )
        if self.classes is not None:
            table, self.class_names, self.category_ids = with_classes(
                table, self.class_names, self.category_ids, self.classes
            )
        edges = np.cumsum([0, *(len(part.files) for part in parts)])
        numbers = {split: np.arange(0) for split in ("train", "val", "test")}
        numbers |= {split: np.arange(a, b) for split, a, b in zip(found.splits, edges, edges[1:])}
        if self.trainval:
            if missing := [split for split in ("val", "test") if not len(numbers[split])]:
                raise UserError(f"data.trainval: '{self.name}' has no {missing[0]} images; expected all three splits")
            numbers["train"] = np.concatenate([numbers["train"], numbers["val"]])
            numbers["val"] = np.arange(0)
        if self.val_fraction:
            if len(numbers["val"]):
                raise UserError(f"data.val_fraction: '{self.name}' has validation images of its own; expected 0")
            kept, held = held_out(len(numbers["train"]), self.val_fraction)
            numbers["train"], numbers["val"] = numbers["train"][kept], numbers["train"][held]
        self._names = [name for part in parts for name in part.names]
        source = FileSource(root, [file for part in parts for file in part.files], None, [])
        store, numbers = self.furnish(table, source, numbers)
        made_of = FileSource(root, [file for part in parts for file in part.made_of], None, [])
        self.fingerprint = fingerprint(
            "detection",
            source.content(),
            made_of.content(),
            *numbers.values(),
            (self.class_names, self.classes, self.resizing, self.pad_multiple, self.pixels, *(["masks"] * self.masks)),
        )
        return store, numbers

    def entry(self, number: int) -> tuple[int, str]:
        """Id and file name of an image in its annotations; VOC's are numbered in the order of their split."""
        return super().entry(number)[0], self._names[number]

    def where(self, number: int) -> str:
        """Path of an image from the folder of the data."""
        source = self.store.source
        return source.files[number].relative_to(source.root).as_posix()
