"""One class of a classification set as the normal one: anomaly detection on images that have no masks."""

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from penstock.datamodules.anomaly import sides
from penstock.datamodules.base import KindDataModule, Store, fingerprint, halves
from penstock.datamodules.masked import CLASS_NAMES
from penstock.lightning_modules.errors import UserError, did_you_mean

Validation = Literal["test", "half"]


class OneClassStore:
    """Images of another store as RGB of 256 levels, with `label` 1 where their class is not the normal one.

    Args:
        store: of images with `label`.
        normal: number of the normal class.
        levels: of the images.
        size: height and width, None as they are.
    """

    def __init__(self, store: Store, normal: int, levels: int, size: tuple[int, int] | None) -> None:
        self.store, self.normal, self.levels, self.size = store, normal, levels, size

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        found = self.store.fetch(numbers)
        images = enlarged(found["image"], self.levels, self.size or found["image"].shape[-2:])
        return {"image": images, "label": (found["label"] != self.normal).long()}

    def warm(self, numbers: np.ndarray) -> None:
        self.store.warm(numbers)


class OneClass(KindDataModule):
    """Trains on the images of one class and tests on all, where those of the other classes are the anomalies.

    Batches have `image` `(3, H, W)`, `label` (0 normal, 1 anomalous) and `index`; there are no masks. Test images are
    those of `data`, or the images it holds out where it has no test split.

    Args:
        data: images with classes; workers, seed and augmentations are those of the whole.
        normal: the normal class, by number or name.
        image_size: side, or [height, width], to resize to (bilinear); `None` = as the images are.
        val: where validation images come from. `half`: from the images that `data` hold out beside a test split of
            their own, else they are a fixed half of the test images of every class, and the other half is the test.
            `test`: they are the test images; what is chosen by them is optimistic.
        batch_size: global training batch; `None` = that of `data`.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`, or that of `data`.

    Attributes:
        defects: names of the other classes; after `setup`, as what follows.
        defect_of: int64 `(n,)`, by number: place in `defects`, -1 for normal images.
        val_is_test: whether the validation images are the test images.

    Raises:
        UserError: data without classes or of another kind, an unknown class, no image held out.
    """

    def __init__(
        self,
        data: KindDataModule,
        normal: int | str = 0,
        image_size: int | tuple[int, int] | None = None,
        val: Validation = "half",
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=data.batch_size if batch_size is None else batch_size,
            eval_batch_size=eval_batch_size or batch_size or data.eval_batch_size,
            num_workers=data.num_workers,
            seed=data.seed,
            pixels=replace(data.pixels, levels=256) if data.pixels else None,
        )
        if val not in get_args(Validation):
            choices = get_args(Validation)
            raise UserError(
                f"data.val: found '{val}', expected one of {', '.join(choices)}{did_you_mean(val, choices)}"
            )
        self.data, self.normal, self.val, self.val_is_test = data, normal, val, val == "test"
        self.size = None if image_size is None else sides(image_size)

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def build(self) -> tuple[OneClassStore, dict[str, np.ndarray]]:
        store, numbers = self.data.build()
        name, shape = type(self.data).__name__, tuple(self.data.shape)
        labels = getattr(store, "labels", None)
        if not self.data.levels or len(shape) != 3 or shape[0] not in (1, 3):
            raise UserError(f"data.data: {name} has samples of shape {shape}; expected grey or RGB images")
        if labels is None:
            raise UserError(f"data.data: {name} has no classes; expected images with classes")
        names, labels = self.data.class_names, labels.numpy()
        normal = self._normal(names)
        self.defects = [n for n in names if n != names[normal]]
        self.defect_of = np.where(labels == normal, -1, labels - (labels > normal)).astype(np.int64)
        numbers = self._split(numbers)
        self.shape, self.class_names = (3, *(self.size or shape[1:])), list(CLASS_NAMES)
        self.fingerprint = fingerprint(
            "one_class", self.data.fingerprint, normal, *numbers.values(), (self.shape, self.pixels)
        )
        return OneClassStore(store, normal, self.data.levels, self.size), numbers

    def where(self, number: int) -> str:
        """Class and number of an image, `cat/00012`."""
        kind = self.defect_of[number]
        name = self._name if kind < 0 else self.defects[kind]
        return f"{name.replace('/', '_')}/{number:05d}"

    def _normal(self, names: list[str]) -> int:
        number = names.index(self.normal) if self.normal in names else self.normal
        if isinstance(number, str) or not 0 <= number < len(names):
            near = did_you_mean(str(self.normal), names)
            raise UserError(f"data.normal: no class '{self.normal}'; found {', '.join(names)}{near}")
        self._name = names[number]
        return number

    def _split(self, numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        train, val, test = numbers["train"], numbers["val"], numbers["test"]
        apart = len(val) and len(test)
        test = test if len(test) else val
        if not len(test):
            raise UserError("data.data: holds out no images to test on; set data.data.val_fraction above 0")
        if self.val == "test":
            val = test
        elif not apart:
            one, other = halves(self.defect_of[test])
            val, test = test[one], test[other]
        return {"train": train[self.defect_of[train] < 0], "val": val, "test": test}


def enlarged(images: Tensor, levels: int, size: tuple[int, int]) -> Tensor:
    """Raw images `(b, 1 or 3, h, w)` of some levels as RGB `(b, 3, H, W)` of 256, uint8; bilinear, antialiased."""
    if levels != 256 or tuple(images.shape[-2:]) != tuple(size):
        scaled = images.float() * (255 / (levels - 1))
        if tuple(images.shape[-2:]) != tuple(size):
            scaled = interpolate(scaled, tuple(size), mode="bilinear", antialias=True)
        images = scaled.round().clamp(0, 255).to(torch.uint8)
    return images.expand(-1, 3, -1, -1).contiguous()
