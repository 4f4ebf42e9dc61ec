"""Folders of images with masks."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((40, 64), (56, 40), (48, 48), (33, 71))


def save(image: np.ndarray, file: Path) -> Path:
    """Writes an image, makes its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
    return file


def mask_tree(
    root: Path,
    splits: tuple[tuple[str, int], ...] = (("training", 8), ("validation", 3)),
    first: int = 1,
    classes: int = 4,
    images: str = "images/{split}/{name}.jpg",
    masks: str = "annotations/{split}/{name}.png",
) -> Path:
    """Pairs as ADE20K has them, of several sizes; the top rows of masks are 0, the rest `first` and what follows it."""
    rng = np.random.default_rng(0)
    for split, count in splits:
        for k in range(count):
            height, width = SIZES[k % len(SIZES)]
            mask = np.repeat(np.repeat(rng.integers(first, first + classes, size=(9, 9)), 8, 0), 8, 1)
            mask = mask[:height, :width].astype(np.uint8)
            mask[:3] = 0
            picture = np.stack([mask * 40, 255 - mask * 40, rng.integers(0, 255, size=mask.shape)], -1)
            names = {"split": split, "name": f"{split}_{k:04d}"}
            save(picture.astype(np.uint8), root / images.format(**names))
            save(mask, root / masks.format(**names))
    return root
