"""Where the official scorers of text-to-image benchmarks look for pictures."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.loggers import write_atomically

END = b"IEND\xaeB`\x82"


class Item(Protocol):
    """A prompt: its name, text and metadata."""

    name: str
    text: str
    metadata: dict[str, Any]


class Layout(ABC):
    """Files of the samples of a list of prompts in one folder.

    Args:
        folder: What the scorer is given.
        items: The prompts.
        samples: Samples of each prompt.
    """

    def __init__(self, folder: Path, items: list[Item], samples: int):
        self.folder, self.items, self.samples = folder, items, samples

    @abstractmethod
    def sample_file(self, item: Item, sample: int) -> Path:
        """Where one sample goes."""

    def finished(self) -> set[int]:
        """Numbers `item * samples + sample` of the samples that exist as whole files."""
        places = [(item, sample) for item in self.items for sample in range(self.samples)]
        return {number for number, place in enumerate(places) if self.holds(*place)}

    def holds(self, item: Item, sample: int) -> bool:
        """Whether the picture of a sample exists as a whole."""
        return is_whole(self.sample_file(item, sample))

    def clean(self) -> None:
        """Removes parts of files that a killed run left; nobody else may be writing."""
        for part in self.folder.rglob(".*.part"):
            part.unlink(missing_ok=True)

    def write(self, item: Item, sample: int, picture: Image.Image) -> None:
        """Writes one sample, unless it is there."""
        if not self.holds(item, sample):
            write_png(self.sample_file(item, sample), picture)

    @abstractmethod
    def finish(self, item: Item) -> None:
        """Called for each prompt once all ranks have written their samples."""


class Folders(Layout):
    """GenEval: `<name>/metadata.jsonl` (one line) and `<name>/samples/0000.png`, `0001.png` ..."""

    def sample_file(self, item: Item, sample: int) -> Path:
        return self.folder / item.name / "samples" / f"{sample:04d}.png"

    def finish(self, item: Item) -> None:
        if (self.folder / item.name).is_dir():
            write_atomically(self.folder / item.name / "metadata.jsonl", f"{json.dumps(item.metadata)}\n")


class Grid(Layout):
    """DPG-Bench: `<name>.png`, four square samples as 2x2 (rows first), or one as it is.

    Until a prompt has all its samples they wait in `<folder>.samples/<name>/`.

    Raises:
        UserError: another number of samples than 1 or 4.
    """

    def __init__(self, folder: Path, items: list[Item], samples: int):
        super().__init__(folder, items, samples)
        if samples not in (1, 4):
            raise UserError(f"data.samples_per_prompt: found {samples}, expected 4 (or 1), as DPG-Bench scores them")
        self.waiting = folder.with_name(f"{folder.name}.samples")

    def sample_file(self, item: Item, sample: int) -> Path:
        return self.waiting / item.name / f"{sample:04d}.png"

    def holds(self, item: Item, sample: int) -> bool:
        return is_whole(self.folder / f"{item.name}.png") or super().holds(item, sample)

    def write(self, item: Item, sample: int, picture: Image.Image) -> None:
        if picture.width != picture.height:
            raise UserError(
                f"DPG-Bench cuts its grids into squares: found samples of {picture.width} x {picture.height} pixels"
            )
        super().write(item, sample, picture)

    def finish(self, item: Item) -> None:
        files = [self.sample_file(item, sample) for sample in range(self.samples)]
        whole = self.folder / f"{item.name}.png"
        if not is_whole(whole) and all(map(is_whole, files)):
            write_png(whole, _tiled([Image.open(file) for file in files]))
        if is_whole(whole) and files[0].parent.is_dir():
            for file in files:
                file.unlink(missing_ok=True)
            with suppress(OSError):
                files[0].parent.rmdir()
                self.waiting.rmdir()


LAYOUTS: dict[str, Callable[[Path, list[Item], int], Layout]] = {"folders": Folders, "grid": Grid}


def is_whole(path: Path) -> bool:
    """Whether a PNG file exists and has its end."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(END), os.SEEK_END)
            return file.read() == END
    except OSError:
        return False


def write_png(path: Path, picture: Image.Image) -> None:
    """Gives the file its name when it is complete.

    Raises:
        UserError: the disk is full, or the folder can't be written.
    """
    picture.save(stream := BytesIO(), "png")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(stream.getvalue())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); the pictures that are complete stay") from error


def _tiled(pictures: list[Image.Image]) -> Image.Image:
    columns = 2 if len(pictures) > 1 else 1
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, len(pictures) // columns * height))
    for n, picture in enumerate(pictures):
        grid.paste(picture, (n % columns * width, n // columns * height))
    return grid
