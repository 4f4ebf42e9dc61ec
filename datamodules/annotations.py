"""Images and the boxes in them as one table, whatever they were written in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.instance_masks import Rle

SLACK = 1.0


@dataclass(frozen=True)
class Annotations:
    """`n` images and `m` boxes; the boxes of an image lie side by side, in the order of the images.

    Attributes:
        image_ids: int64 `(n,)`, as evaluation servers know them.
        sizes: int64 `(n, 2)`, height and width.
        image_of: int64 `(m,)`, ascending, place of the image of each box.
        boxes: float64 `(m, 4)`, x1 y1 x2 y2 in pixels, x2 - x1 is the width.
        classes: int64 `(m,)`.
        crowd: bool `(m,)`, boxes that no detector is trained on and that evaluation ignores.
        areas: float64 `(m,)`, in pixels, of the object (COCO: of its mask).
        masks: objects `(m,)`, see `instance_masks.Rle`; None where they were not asked for.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    image_of: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows(self, number: int) -> slice:
        """The boxes of one image."""
        first, last = np.searchsorted(self.image_of, (number, number + 1))
        return slice(int(first), int(last))

    def filled(self) -> np.ndarray:
        """bool `(n,)`: images with a box to train on."""
        return np.bincount(self.image_of[~self.crowd], minlength=len(self)) > 0

    def only(self, keep: np.ndarray) -> "Annotations":
        """The same images with the boxes where `keep` `(m,)` is true."""
        columns = ("image_of", "boxes", "classes", "crowd", "areas", *(["masks"] if self.masks is not None else []))
        return replace(self, **{name: getattr(self, name)[keep] for name in columns})


def annotations(
    sizes: Sequence[tuple[int, int]],
    image_of: Sequence[int],
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    crowd: Sequence[bool],
    areas: Sequence[float],
    *,
    image_ids: Sequence[int],
    where: Callable[[int], str],
    place: str,
    masks: Sequence[Rle] | None = None,
) -> Annotations:
    """A table of boxes in any order, checked against the sizes of their images.

    Boxes that stick out are cut at the edges: silently by up to a pixel, as rounding does, with one warning by more.
    Boxes of zero area are left out, with one warning.

    Args:
        sizes: height and width of each image.
        image_of: place of the image of each box.
        boxes: x1 y1 x2 y2.
        classes: of the boxes.
        crowd: likewise.
        areas: likewise.
        image_ids: of the images.
        where: names a box for messages.
        place: the file or folder, for warnings.
        masks: of the boxes.

    Raises:
        UserError: a box that is not finite, of negative width or height, or wholly outside its image.
    """
    image_of, sizes = np.asarray(image_of, dtype=np.int64), np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    order = np.argsort(image_of, kind="stable")
    raw = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[order]
    table = Annotations(
        np.asarray(image_ids, dtype=np.int64),
        sizes,
        image_of[order],
        raw,
        np.asarray(classes, dtype=np.int64)[order],
        np.asarray(crowd, dtype=bool)[order],
        np.asarray(areas, dtype=np.float64)[order],
        None if masks is None else np.array([*masks, None], dtype=object)[:-1][order],
    )
    limits = sizes[table.image_of][:, [1, 0, 1, 0]].astype(np.float64)

    def told(row: int) -> str:
        (height, width), sides = sizes[table.image_of[row]], raw[row, 2:] - raw[row, :2]
        return (
            f"{where(int(order[row]))} of {sides[0]:g}x{sides[1]:g} at {raw[row, :2].tolist()} ({width}x{height} image)"
        )

    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            raise UserError(f"{told(int(bad.argmax()))} {what}")

    refuse(~np.isfinite(raw).all(1), "is not finite; expected numbers")
    sides = raw[:, 2:] - raw[:, :2]
    refuse((sides < 0).any(1), "has a negative side; expected x, y, width and height in pixels")
    flat = (sides == 0).any(1)
    outside = (raw[:, :2] >= limits[:, :2]).any(1) | (raw[:, 2:] <= 0).any(1)
    refuse(outside & ~flat, "lies outside of its image; expected a box in it")
    cut = np.clip(raw, 0, limits)
    over = (np.abs(cut - raw) > SLACK).any(1) & ~flat
    for bad, what in ((flat, "of zero area left out"), (over, "cut at the edge of the image")):
        if bad.any():
            rank_zero_warn(f"{place}: {bad.sum()} of {len(raw)} boxes {what}; the first is {told(int(bad.argmax()))}")
    return replace(table, boxes=cut).only(~flat)


def joined(parts: Sequence[Annotations]) -> Annotations:
    """Tables of several splits as one."""
    first = np.cumsum([0, *map(len, parts)])
    names = [name for name in Annotations.__dataclass_fields__ if getattr(parts[0], name) is not None]
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    columns["image_of"] = [rows + start for rows, start in zip(columns["image_of"], first)]
    return Annotations(**{name: np.concatenate(values) for name, values in columns.items()})


def with_classes(
    table: Annotations,
    names: Sequence[str],
    ids: Sequence[int],
    wanted: Sequence[str] | Mapping[str, Sequence[str]],
) -> tuple[Annotations, list[str], list[int]]:
    """The table with some of its classes, numbered in the order of `wanted`; other boxes are left out.

    Args:
        table: of classes `names`, which have the ids `ids`.
        wanted: names, or new names of one or several old ones each; such a class has the id of the first.

    Returns:
        The table, its class names and their ids.

    Raises:
        UserError: no class, a class that there is not (the nearest is named), or one that is wanted twice.
    """
    groups = {name: [name] for name in wanted} if not isinstance(wanted, Mapping) else dict(wanted)
    olds = [old for group in groups.values() for old in group]
    if not olds or not all(groups.values()):
        raise UserError(f"data.classes: found {wanted}, expected names of classes, some of {', '.join(names)}")
    for old in olds:
        if old not in names:
            raise UserError(f"data.classes: no class '{old}'; found {', '.join(names)}{did_you_mean(old, names)}")
    if twice := [old for old in olds if olds.count(old) > 1] or ([] if len(groups) == len(wanted) else list(wanted)):
        raise UserError(f"data.classes: '{twice[0]}' is there twice; expected each class once")
    new = np.full(len(names), -1)
    for number, group in enumerate(groups.values()):
        new[[names.index(old) for old in group]] = number
    table = replace(table, classes=new[table.classes])
    return table.only(table.classes >= 0), list(groups), [ids[names.index(group[0])] for group in groups.values()]


def inside(name: str, where: str) -> str:
    """A file's name from its folder.

    Raises:
        UserError: it leaves the folder.
    """
    windows = PureWindowsPath(name)
    if not name or windows.drive or windows.root or ".." in windows.parts or ".." in PurePosixPath(name).parts:
        raise UserError(f"{where}: the file '{name}' leaves the folder of the images; expected a name in it")
    return name
