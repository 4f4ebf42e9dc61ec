"""The embedded segmentation set: scenes of scikit-learn's digits with the class of every pixel."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from penstock.datamodules.base import fingerprint
from penstock.datamodules.digit_scenes import SPLITS, draw_scene, shares
from penstock.datamodules.segmented import SegmentedData, SegmentedStore
from penstock.lightning_modules.errors import UserError

CLASSES = ["background", *(str(n) for n in range(10))]


class DrawnPairs:
    """Pairs that lie in memory; see `PairSource`.

    Args:
        pictures: uint8 `(n, S, S, 3)`.
        masks: uint8 `(n, S, S)`.
        counts: of train, val and test, one after the other.
    """

    def __init__(self, pictures: np.ndarray, masks: np.ndarray, counts: tuple[int, int, int]) -> None:
        self.pictures, self.masks, self.counts = pictures, masks, counts

    def __len__(self) -> int:
        return len(self.masks)

    def where(self, row: int) -> str:
        """Split and number of a scene, `test/00012`."""
        split = int(np.searchsorted(np.cumsum(self.counts), row, side="right"))
        return f"{SPLITS[split]}/{row - sum(self.counts[:split]) + 1:05d}"

    def pair(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.pictures[row]).permute(2, 0, 1), torch.from_numpy(self.masks[row])


class DigitMasks(SegmentedData):
    """Scenes of hand-written digits whose pixels are background or ink of one of ten digits, eleven classes.

    `SegmentedData` says what is in a batch, `draw_scene` how scenes are drawn: those of `DigitScenes`, the empty ones
    too. They are the same for every seed of a run; training, validation and test show different digits.

    Args:
        scenes: for training; validation and test have a quarter of so many each.
        image_size: side of the scenes, at least 64.
        ratio: least and largest factor of their size in training; what is smaller than a scene is padded, of what is
            larger a place is drawn that shows a digit, if it can be found.
        distort: change brightness, contrast, saturation and hue of training images.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; the set lies in memory, 0 is fastest.
        seed: key of order and crops; `None` = the seed of the run.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        scenes: int = 800,
        image_size: int = 128,
        ratio: tuple[float, float] = (0.75, 1.5),
        distort: bool = True,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        for key, value, least in (("scenes", scenes, 4), ("image_size", image_size, 64)):
            if value < least:
                raise UserError(f"data.{key}: found {value}, expected at least {least}")
        super().__init__(
            min_size=image_size,
            max_size=image_size,
            crop_size=image_size,
            ratio=ratio,
            cat_max_ratio=1.0,
            flip=False,
            distort=distort,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.counts, self.side = (scenes, scenes // 4, scenes // 4), image_size

    def build(self) -> tuple[SegmentedStore, dict[str, np.ndarray]]:
        inks, labels = load_digits(return_X_y=True)
        inks = inks.reshape(-1, 8, 8) / 16
        pictures, masks = [], []
        for stream, (choices, count) in enumerate(zip(shares(len(inks)), self.counts)):
            for n in range(count):
                scene = draw_scene(np.random.default_rng((stream, n)), inks, choices, self.side)
                class_of = np.array([0, *(labels[scene.digits] + 1)], dtype=np.uint8)
                pictures.append(scene.picture)
                masks.append(class_of[scene.mask])
        pictures, masks = np.stack(pictures), np.stack(masks)
        self.num_classes, self.class_names = len(CLASSES), CLASSES
        self.fingerprint = fingerprint("digit_masks", pictures, masks, self.counts, self.cropping)
        edges = np.cumsum([0, *self.counts])
        numbers = {split: np.arange(a, b) for split, a, b in zip(SPLITS, edges, edges[1:])}
        return self.furnish(DrawnPairs(pictures, masks, self.counts), in_memory=False), numbers
