"""Sets of photographs with masks: folders of images and of masks whose files have the same names.

A split is a folder in both (`images/training` and `annotations/training`), or both are in that of a split
(`train/images`); or there are no splits, and both have files of their own. Which of them it is, is seen from the
folders.
"""

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from penstock.datamodules.image_sources import SPLIT_NAMES, FileSource, digest_files, named
from penstock.datamodules.images import check_depth, load_image
from penstock.lightning_modules.class_masks import IGNORED
from penstock.lightning_modules.errors import UserError, did_you_mean

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASKS = (".png", ".bmp", ".tif", ".tiff")
NUMBERED = ("1", "L", "P", "I", "I;16", "I;16B")


@dataclass(frozen=True)
class Pairs:
    """Files of one split, in the order of their names."""

    images: list[Path]
    masks: list[Path]


def open_pairs(root: Path, images: str, masks: str, suffix: str = "") -> dict[str, Pairs]:
    """Splits by the names `train`, `val`, `test`; test images without masks are not there.

    Args:
        root: of the set.
        images: folder of images.
        masks: folder of masks.
        suffix: what stands in the name of a mask behind the image's.

    Raises:
        UserError: no such folders, no training images, a split without images, an image without mask or a mask without
            image; it is named.
    """
    found = {}
    for split, names in SPLIT_NAMES.items():
        places = [(root / images / n, root / masks / n) for n in names] + [
            (root / n / images, root / n / masks) for n in names
        ]
        if place := next((place for place in places if place[0].is_dir()), None):
            if split == "test" and not place[1].is_dir():
                continue
            found[split] = _pairs(*place, suffix)
    if found and "train" not in found:
        _refuse(root, images)
    if not found:
        _refuse_without_files(root, images)
        found["train"] = _pairs(root / images, root / masks, suffix)
    return found


def _refuse_without_files(root: Path, images: str) -> None:
    folder = root / images
    if not folder.is_dir():
        names = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise UserError(
            f"data.images: no folder '{images}' in {root}; found {', '.join(names[:8]) or 'no folders'}"
            f"{did_you_mean(images, names)}"
        )
    if not any(p.suffix.lower() in IMAGES for p in folder.iterdir()):
        _refuse(root, images)


def _refuse(root: Path, images: str) -> None:
    folder = root / images if (root / images).is_dir() else root
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    raise UserError(
        f"{folder}: no training images; found {', '.join(names[:8]) or 'no folders'}, expected "
        f"{' or '.join(SPLIT_NAMES['train'])}, or images{did_you_mean('training', names)}"
    )


def _pairs(images: Path, masks: Path, suffix: str) -> Pairs:
    if not masks.is_dir():
        raise UserError(f"data.masks: no folder {masks}; expected the masks of {images}")
    pictures = sorted(p for p in images.rglob("*") if p.suffix.lower() in IMAGES)
    if not pictures:
        raise UserError(f"{images}: no images; expected files {' '.join(IMAGES)}")
    stems = [p.relative_to(images).with_suffix("").as_posix() for p in pictures]
    if twice := next((stem for stem, count in Counter(stems).items() if count > 1), None):
        raise UserError(f"{images}: several images are called '{twice}'; expected one for each mask")
    files = {p.relative_to(masks).with_suffix("").as_posix(): p for p in sorted(masks.rglob("*")) if _is_mask(p)}
    paired = [files.pop(f"{stem}{suffix}", None) for stem in stems]
    if missing := [k for k, mask in enumerate(paired) if mask is None]:
        raise UserError(
            f"{pictures[missing[0]]}: no mask; expected {masks / stems[missing[0]]}{suffix}.png"
            f"{_count(missing, 'images')}{did_you_mean(stems[missing[0]] + suffix, files)}"
        )
    if files:
        stem, mask = next(iter(files.items()))
        raise UserError(f"{mask}: no image; expected {images / stem.removesuffix(suffix)}.jpg{_count(files, 'masks')}")
    return Pairs(pictures, paired)


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in MASKS


def _count(found: Sized, what: str) -> str:
    return f"; {len(found)} {what} have none" if len(found) > 1 else ""


def numbering(num_classes: int, ignored: int, reduce_zero_label: bool) -> np.ndarray:
    """int16 `(256,)`: the class that a value of a file stands for, `IGNORED`, or -1 for values that none may have.

    Args:
        num_classes: K.
        ignored: value of pixels that count for nothing.
        reduce_zero_label: whether 0 is one more, and classes are numbered from 1.

    Raises:
        UserError: `ignored` is the value of a class.
    """
    first = int(reduce_zero_label)
    if not num_classes + first <= ignored <= 255:
        raise UserError(
            f"data.ignore_index: found {ignored}, expected a number that is no class, "
            f"{num_classes + first} to 255, such as 255"
        )
    table = np.full(256, -1, dtype=np.int16)
    table[[0, ignored]] = IGNORED
    table[first : first + num_classes] = np.arange(num_classes)
    return table


def read_mask(file: Path, table: np.ndarray) -> np.ndarray:
    """Classes of a file's pixels, uint8 `(H, W)`.

    Args:
        file: of one channel; of a palette the numbers count, not the colours.
        table: see `numbering`.

    Raises:
        UserError: it cannot be read, has several channels, or a value that is no class.
    """
    with named(str(file)):
        image = Image.open(file)
        image.load()
    if image.mode not in NUMBERED:
        raise UserError(
            f"{file}: found {image.mode} pixels, expected one channel with the number of each pixel's class"
        )
    values = np.asarray(image).astype(np.int64)
    inside = (values >= 0) & (values < len(table))
    found = np.where(inside, table[np.where(inside, values, 0)], -1)
    if (found < 0).any():
        row, column = (int(k) for k in np.argwhere(found < 0)[0])
        raise UserError(f"{file}: found the value {values[row, column]} at row {row}, column {column}; {_told(table)}")
    return found.astype(np.uint8)


def _told(table: np.ndarray) -> str:
    """What values a file may have."""
    classes, ignored = np.flatnonzero((table >= 0) & (table < IGNORED)), np.flatnonzero(table == IGNORED)
    hint = "" if classes[0] else ", or data.reduce_zero_label=true where classes are numbered from 1"
    others = " and ".join(str(k) for k in ignored)
    return f"expected {classes[0]} to {classes[-1]}, or {others} for what is no class{hint}"


class FilePairs:
    """Pairs of files; see `PairSource`.

    Args:
        root: of the set.
        images: in the order of their numbers.
        masks: likewise.
        table: see `numbering`.
    """

    def __init__(self, root: Path, images: Sequence[Path], masks: Sequence[Path], table: np.ndarray) -> None:
        self.root, self.images, self.masks, self.table = root, FileSource(root, images, None, []), list(masks), table

    def __len__(self) -> int:
        return len(self.masks)

    def where(self, row: int) -> str:
        return self.images.files[row].relative_to(self.root).as_posix()

    def pair(self, row: int) -> tuple[Tensor, Tensor]:
        """Image and mask, see `PairSource`.

        An image whose EXIF data turn it has the size of its mask either as it lies in the file or as it is shown.

        Raises:
            UserError: one that cannot be read, more than 8 bits a channel, another size, or as `read_mask`.
        """
        image, mask = load_image(self.images, row), read_mask(self.masks[row], self.table)
        check_depth(image, self.images.where(row))
        expected = mask.shape[::-1]
        if image.size != expected:
            image = ImageOps.exif_transpose(image)
        if image.size != expected:
            raise UserError(
                f"{self.masks[row]}: found {expected[0]}x{expected[1]} pixels, expected "
                f"{image.width}x{image.height} as {self.images.where(row)}"
            )
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), torch.from_numpy(mask)

    def pixels(self) -> int:
        """Of all images, by their headers."""
        total = 0
        for row, file in enumerate(self.images.files):
            with named(self.images.where(row)), Image.open(file) as image:
                total += image.width * image.height
        return total

    def content(self) -> tuple[str, str]:
        """What the fingerprint counts."""
        return digest_files(self.root, self.images.files), digest_files(self.root, self.masks)
