"""How one video is read, from disk or from a tar shard: files by torchcodec, GIFs, stills, folders of frames by Pillow.

Seconds count from the first frame. GIFs are always Pillow's, so that they need no further package and give the same
bits everywhere.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.datamodules.tar_shards import Member, opened
from penstock.lightning_modules.errors import UserError

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TIE = 1e-6
NO_DELAY = 0.1
Place = Path | Member
Seek = Literal["exact", "approximate"]


class Reader(Protocol):
    """An opened video of `count` frames of `height` x `width` that lasts `seconds`."""

    count: int
    seconds: float
    height: int
    width: int

    def frames(self, rows: np.ndarray) -> Tensor:
        """Frames `rows` `(n,)` by number, uint8 `(n, 3, H, W)`."""

    def near(self, seconds: np.ndarray) -> Tensor:
        """The frames whose time stamps are nearest to `seconds` `(n,)`, of two equally near ones the earlier."""

    def first_from(self, seconds: float) -> int:
        """Number of the first frame that does not begin before `seconds`."""


class _Timed:
    """Frames with a table of time stamps."""

    def __init__(self, times: np.ndarray, last: float, size: tuple[int, int]) -> None:
        self.times, self.count, self.seconds = times, len(times), float(times[-1] + last)
        self.width, self.height = size

    def frames(self, rows: np.ndarray) -> Tensor:
        raise NotImplementedError

    def near(self, seconds: np.ndarray) -> Tensor:
        middle = (self.times[1:] + self.times[:-1]) / 2
        return self.frames(np.searchsorted(middle, seconds - TIE))

    def first_from(self, seconds: float) -> int:
        return int(np.searchsorted(self.times, seconds - TIE))


class PictureReader(_Timed):
    """Picture files of one size, in the order of the numbers in their names.

    Args:
        files: the frames; a single one is a still.
        fps: their rate.
    """

    def __init__(self, files: Sequence[Place], fps: float) -> None:
        self.files = list(files)
        with Image.open(opened(self.files[0])) as image:
            super().__init__(np.arange(len(files)) / fps, 1 / fps, image.size)

    def frames(self, rows: np.ndarray) -> Tensor:
        return torch.stack([self._frame(self.files[row]) for row in rows])

    def _frame(self, file: Place) -> Tensor:
        with readable(file, "the frame"), Image.open(opened(file)) as image:
            if image.size != (self.width, self.height):
                raise UserError(
                    f"{file}: found {image.width}x{image.height} pixels, expected {self.width}x{self.height} as in "
                    f"{self.files[0].name}"
                )
            return _pixels(image)


class GifReader(_Timed):
    """An animated GIF; frames without a duration last 0.1 s, as browsers and FFmpeg show them."""

    def __init__(self, file: Place) -> None:
        self.file = file
        with Image.open(opened(file)) as image:
            lasting = []
            for row in range(image.n_frames):
                image.seek(row)
                lasting.append(image.info.get("duration", 0) / 1000 or NO_DELAY)
            super().__init__(np.cumsum([0.0, *lasting[:-1]]), lasting[-1], image.size)

    def frames(self, rows: np.ndarray) -> Tensor:
        found = {}
        with Image.open(opened(self.file)) as image:
            for row in np.unique(rows).tolist():
                image.seek(row)
                found[row] = _pixels(image)
        return torch.stack([found[row] for row in rows.tolist()])


class FileReader:
    """A video file, by torchcodec (FFmpeg).

    Its nearest frame is the one on screen half an average frame later: exact for a constant rate, off by less than the
    unevenness of the rate otherwise. The first frame is decoded before any other: some files have the parameters of
    their codec nowhere else, and FFmpeg makes garbage of what it finds after a jump.

    Args:
        file: anything that FFmpeg reads.
        seek: `exact` reads the whole file once to find its frames; `approximate` trusts its header.

    Raises:
        UserError: torchcodec or FFmpeg is missing.
    """

    def __init__(self, file: Place, seek: Seek) -> None:
        try:
            from torchcodec.decoders import VideoDecoder
        except ImportError as error:
            raise UserError(
                f"{file}: {file.suffix} files are read by torchcodec, which is not installed; expected pip install "
                "'penstock[video]', or folders of frames or GIFs"
            ) from error
        try:
            content = file.read() if isinstance(file, Member) else str(file)
            self.decoder = VideoDecoder(content, seek_mode=seek)
        except RuntimeError as error:
            if "libtorchcodec" not in str(error):
                raise
            raise UserError(
                f"{file}: torchcodec cannot load FFmpeg; expected FFmpeg's shared libraries, and the torchcodec made "
                "for this version of PyTorch"
            ) from error
        about = self.decoder.metadata
        if not about.num_frames or not about.average_fps:
            raise ValueError("its header tells no number of frames; data.seek=exact counts them")
        self.decoder.get_frame_at(0)
        self.count, self.fps = int(about.num_frames), float(about.average_fps)
        self.begin, self.seconds = about.begin_stream_seconds, about.end_stream_seconds - about.begin_stream_seconds
        self.width, self.height = about.width, about.height

    def frames(self, rows: np.ndarray) -> Tensor:
        return self.decoder.get_frames_at(rows.tolist()).data

    def near(self, seconds: np.ndarray) -> Tensor:
        shown = np.clip(seconds + 0.5 / self.fps - TIE, 0, self.seconds - TIE)
        return self.decoder.get_frames_played_at((self.begin + shown).tolist()).data

    def first_from(self, seconds: float) -> int:
        return int(np.ceil((seconds - TIE) * self.fps))


def open_video(path: Place, *, frames_fps: float = 1.0, seek: Seek = "exact", what: str = "the video") -> Reader:
    """Opens a video file, a GIF, a still, or a folder of frames.

    Args:
        path: told apart by its ending; a folder holds the frames of one video. A member of a tar shard is read whole.
        frames_fps: rate of a folder of frames.
        seek: how `FileReader` finds frames.
        what: what errors call it.

    Raises:
        UserError: it cannot be read, or is a folder without pictures; it is named.
    """
    with readable(path, what):
        if isinstance(path, Path) and path.is_dir():
            if not (files := frame_files(path)):
                raise UserError(f"{path}: no pictures in it; expected frames, {' '.join(FRAME_SUFFIXES)}")
            return PictureReader(files, frames_fps)
        if path.suffix.lower() in FRAME_SUFFIXES:
            return PictureReader([path], frames_fps)
        return GifReader(path) if path.suffix.lower() == ".gif" else FileReader(path, seek)


def frame_files(folder: Path) -> list[Path]:
    """The pictures directly in a folder, `2.png` before `10.png`."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES and not p.name.startswith(".")]
    return sorted(files, key=lambda p: ([int(n) for n in re.findall(r"\d+", p.stem)], p.name))


@contextmanager
def readable(path: Place, what: str) -> Iterator[None]:
    """Names the file where decoding fails.

    Raises:
        UserError: in place of what Pillow and torchcodec raise.
    """
    try:
        yield
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        RuntimeError,
        Image.DecompressionBombError,
    ) as error:
        reason = re.sub(r"^\w+, \S+:\d+, ", "", " ".join(str(error).split()))[:200]
        raise UserError(
            f"{path}: cannot read {what} ({type(error).__name__}: {reason}); expected a complete file"
        ) from error


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
