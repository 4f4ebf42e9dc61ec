"""Layouts of anomaly-detection sets: MVTec AD, BTAD, and VisA by its split file.

One category is a folder of

- MVTec AD: `train/good`, `test/good`, `test/<defect>`, `ground_truth/<defect>`;
- BTAD: the same with `ok` for `good` (its one defect folder is `ko`);
- VisA as it is published: `Data/Images`, `Data/Masks`, and beside the categories `split_csv/1cls.csv` with the columns
  object, split, label, image, mask (paths from the folder of the categories).

Which of them it is, is seen from the folders.
"""

import csv
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from penstock.datamodules.image_sources import digest_files, named, turn_upright
from penstock.lightning_modules.errors import UserError, did_you_mean

NORMAL_NAMES = ("good", "ok")
VISA_SPLIT = Path("split_csv", "1cls.csv")
VISA_COLUMNS = ("object", "split", "label", "image", "mask")
VISA_NORMAL, VISA_ANOMALY = "normal", "anomaly"
EXPECTED = "train/good (MVTec AD), train/ok (BTAD) or Data/Images (VisA)"


@dataclass(frozen=True)
class Category:
    """Files of one category.

    Attributes:
        folder: of the category.
        train: normal images.
        test: normal ones first, then by defect.
        defects: names of the kinds of defects.
        defect_of: int64 `(len(test),)`, place in `defects`, -1 for normal images.
        masks: of `test`, None for normal images.
    """

    folder: Path
    train: list[Path]
    test: list[Path]
    defects: list[str]
    defect_of: np.ndarray
    masks: list[Path | None]

    def content(self) -> tuple[str, str]:
        """What the fingerprint counts of images and masks."""
        return (
            digest_files(self.folder, [*self.train, *self.test]),
            digest_files(self.folder, [mask for mask in self.masks if mask]),
        )


def find_category(root: Path, category: str | None) -> Path:
    """The folder of a category, `root` itself for None.

    Raises:
        UserError: there is none of this name; the nearest is named.
    """
    if category is None:
        return root
    found = _folders(root)
    if category not in found:
        own = "; set data.category=null, it is a category itself" if _is_category(root) else ""
        own = "; one after the other: penstock fit -m ... data.category=all" if category == "all" and not own else own
        raise UserError(
            f"data.category: no folder '{category}' in {root}; found {', '.join(found) or 'no folders'}"
            f"{did_you_mean(category, found)}{own}"
        )
    return root / category


def find_categories(root: Path) -> list[str]:
    """Names of the categories in a folder, sorted.

    Raises:
        UserError: there are none.
    """
    found = [name for name in _folders(root) if _is_category(root / name)]
    if not found:
        names = ", ".join(_folders(root)) or "no folders"
        raise UserError(f"{root}: no categories; found {names}; expected folders with {EXPECTED}")
    return found


def open_category(folder: Path) -> Category:
    """The files of a category in any of the layouts; sizes of masks are compared with those of their images.

    Raises:
        UserError: no known layout, no normal images, an anomaly without mask or with one of another size, files that
            the split file names and that are not there or not in the folder.
    """
    category = _open_visa(folder) if (folder / "Data" / "Images").is_dir() else _open_tree(folder)
    for image, mask in zip(category.test, category.masks):
        if mask and (expected := _size(image)) != (found := _size(mask)):
            raise UserError(
                f"{mask}: found {found[0]}x{found[1]} pixels, expected {expected[0]}x{expected[1]} as {image}"
            )
    return category


def pair_masks(images: Sequence[Path], masks: Sequence[Path], folder: Path) -> list[Path]:
    """The mask of every image of a defect.

    Its name is the image's, or that and `_mask`, or else has the image's in it; suffixes do not count.

    Args:
        images: of one defect.
        masks: of the same.
        folder: of the masks, for messages.

    Raises:
        UserError: an image has no mask, or could have several.
    """
    by_stem = {mask.stem: mask for mask in reversed(masks)}
    found = {image: by_stem.get(image.stem) or by_stem.get(f"{image.stem}_mask") for image in images}
    taken = set(found.values())
    free = [mask for mask in masks if mask not in taken]
    for image in sorted((i for i, mask in found.items() if not mask), key=lambda i: len(i.stem), reverse=True):
        near = [mask for mask in free if image.stem in mask.stem]
        if len(near) != 1:
            names = f"several masks, {', '.join(m.name for m in near[:3])}" if near else "no mask"
            raise UserError(f"{image}: {names} in {folder}; expected one, {image.stem}_mask.png or {image.stem}.png")
        found[image] = near[0]
        free.remove(near[0])
    return list(found.values())


def load_mask(file: Path, height: int, width: int) -> np.ndarray:
    """A mask at another size by the nearest pixel: uint8 `(height, width)`, 1 where any channel is above 0.

    Raises:
        UserError: the file cannot be read.
    """
    with named(str(file)), Image.open(file) as image:
        turn_upright(image)
        pixels, alpha = np.asarray(image), image.mode in ("LA", "RGBA", "PA")
    if pixels.ndim == 3:
        pixels = (pixels[..., :-1] if alpha else pixels).any(-1)
    rows, columns = (_nearest(*sides) for sides in zip(pixels.shape, (height, width)))
    return (pixels[rows[:, None], columns] > 0).astype(np.uint8)


def _nearest(old: int, new: int) -> np.ndarray:
    """Of `old` pixels those under the centres of `new` ones, int64 `(new,)`."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def _open_tree(folder: Path) -> Category:
    if not (folder / "train").is_dir():
        raise UserError(
            f"{folder}: no training folder; found {', '.join(_folders(folder)) or 'no folders'}; expected {EXPECTED}"
        )
    found = _folders(folder / "train")
    normal = [name for name in NORMAL_NAMES if name in found]
    if len(normal) != 1:
        names = ", ".join(found) or "no folders"
        raise UserError(f"{folder / 'train'}: found {names}; expected one of {', '.join(NORMAL_NAMES)}")
    train = _images(folder / "train" / normal[0])
    test, defect_of, masks = [], [], []
    kinds = _folders(folder / "test") if (folder / "test").is_dir() else []
    defects = [name for name in kinds if name not in normal]
    for k, name in [(-1, name) for name in kinds if name in normal] + list(enumerate(defects)):
        images, marked = _images(folder / "test" / name), folder / "ground_truth" / name
        test += images
        defect_of += [k] * len(images)
        masks += pair_masks(images, _image_files(marked), marked) if k >= 0 else [None] * len(images)
    return Category(folder, train, test, defects, np.array(defect_of, dtype=np.int64), masks)


def _open_visa(folder: Path) -> Category:
    folder = Path(os.path.abspath(folder))
    table = folder.parent / VISA_SPLIT
    train, whole, spoiled, masks = [], [], [], []
    for where, row in _visa_rows(table, folder.name):
        split, label = row["split"], row["label"]
        if split not in ("train", "test") or label not in (VISA_NORMAL, VISA_ANOMALY):
            raise UserError(
                f"{where}: found split '{split}', label '{label}'; expected train or test, normal or anomaly"
            )
        image = _visa_file(folder, row["image"], f"{where}, image")
        if label == VISA_NORMAL:
            (train if split == "train" else whole).append(image)
        elif split == "train":
            raise UserError(f"{where}: an anomaly in the training split; expected normal images only")
        else:
            spoiled.append(image)
            masks.append(_visa_file(folder, row["mask"], f"{where}, mask of {row['image']}"))
    if not train:
        raise UserError(f"{table}: no normal training images of '{folder.name}'")
    defect_of = np.repeat(np.array([-1, 0]), [len(whole), len(spoiled)])
    return Category(
        folder, train, whole + spoiled, [VISA_ANOMALY] if spoiled else [], defect_of, [None] * len(whole) + masks
    )


def _visa_rows(table: Path, category: str) -> list[tuple[str, dict[str, str]]]:
    """Place and cells of every row of one category."""
    if not table.is_file():
        raise UserError(f"{table}: no such file; expected VisA's split file beside its categories")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if missing := [name for name in VISA_COLUMNS if name not in columns]:
                raise UserError(f"{table}: no column {', '.join(missing)}; found {', '.join(columns) or 'none'}")
            rows = [(f"{table} line {reader.line_num}", {k: row[k] or "" for k in VISA_COLUMNS}) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table}: cannot be read as a table ({error})") from error
    objects = sorted({row["object"] for _, row in rows})
    if category not in objects:
        found = ", ".join(objects) or "no rows"
        raise UserError(f"{table}: no rows of object '{category}'; found {found}{did_you_mean(category, objects)}")
    return [(where, row) for where, row in rows if row["object"] == category]


def _visa_file(folder: Path, path: str, where: str) -> Path:
    """A file that a row names by its path from the folder of the categories; it must lie in its category's."""
    if not path:
        raise UserError(f"{where}: no path; expected a file in {folder}")
    file = Path(os.path.normpath(folder.parent / path))
    if not file.is_relative_to(folder):
        raise UserError(f"{where}: path '{path}' leaves the folder {folder}")
    if not file.is_file():
        raise UserError(f"{where}: no file at {file}")
    return file


def _is_category(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "Data" / "Images").is_dir()


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    files = _image_files(folder)
    if not files:
        raise UserError(f"{folder}: no images; expected image files (png, jpg, bmp, tif, webp)")
    return files


def _size(file: Path) -> tuple[int, int]:
    """Width and height of the upright image as the head of the file says."""
    with named(str(file)), Image.open(file) as image:
        width, height = image.size
        with suppress(SyntaxError):  # of EXIF data
            exif = Image.Image.getexif(image)  # a PNG's own decodes its pixels first
            if exif.get(ExifTags.Base.Orientation) in range(5, 9):
                return height, width
        return width, height
