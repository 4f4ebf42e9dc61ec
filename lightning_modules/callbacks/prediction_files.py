"""Files that `penstock predict` leaves: pictures under names of their own, in place of an earlier prediction's."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

MARK = {"Software": "penstock predict"}  # in every picture: a later prediction removes these and no others


def picture_name(file: str) -> str:
    """The name of a file with `.png` behind it, where it is no PNG's; no two image files get the same.

    `a.png` stays, `a.jpg` becomes `a.jpg.png`, and `a.jpg.png` becomes `a.jpg.png.png`.
    """
    stem, suffix = os.path.splitext(file)
    return file if suffix == ".png" and not stem.lower().endswith(IMG_EXTENSIONS) else f"{file}.png"


def save_picture(folder: Path, file: str, picture: Tensor, palette: bytes | None = None) -> None:
    """Writes a picture, uint8 `(H, W, 3)` or `(H, W)`, of an image file below a folder, see `picture_name`.

    Args:
        folder: Of the pictures.
        file: Of the image.
        picture: Its pixels; with a palette their numbers in it.
        palette: R, G and B of the numbers, one after the other.
    """
    place = folder / picture_name(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    notes = PngImagePlugin.PngInfo()
    for key, value in MARK.items():
        notes.add_text(key, value)
    image = Image.fromarray(picture.contiguous().numpy())
    if palette is not None:
        image.putpalette(palette)
    image.save(place, pnginfo=notes)


def clear(folder: Path, files: Iterable[str], tops: Iterable[str]) -> None:
    """Removes what a prediction left in its folder.

    Args:
        folder: Of the predictions.
        files: Names of files that are removed.
        tops: Names of folders whose pictures are; they go, too, where nothing else is in them.
    """
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for top in (folder / name for name in tops):
        for file in [path for path in top.rglob("*.png") if path.is_file() and _is_ours(path)]:
            file.unlink()
            with suppress(OSError):  # not empty
                for place in (folder / up for up in file.relative_to(folder).parents[:-1]):
                    place.rmdir()


def make_room(trainer: pl.Trainer, folder: Path, files: Iterable[str], tops: Iterable[str]) -> None:
    """`clear`, once for all ranks, which have to call it."""
    if trainer.is_global_zero:
        clear(folder, files, tops)
    trainer.strategy.barrier()


def _is_ours(file: Path) -> bool:
    with suppress(OSError, SyntaxError), Image.open(file) as image:
        return MARK.items() <= image.info.items()
    return False
