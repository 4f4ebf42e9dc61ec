"""MP4 files where the official scorers of text-to-video benchmarks look for them."""

import os
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from penstock.lightning_modules.callbacks.benchmark_layouts import Item, Layout
from penstock.lightning_modules.errors import UserError


class Videos(Layout):
    """VBench: `<prompt>-0.mp4`, `<prompt>-1.mp4` ... in one folder; parts of files wait in `<folder>.parts/`."""

    def __init__(self, folder: Path, items: list[Item], samples: int):
        super().__init__(folder, items, samples)
        self.waiting = folder.with_name(f"{folder.name}.parts")

    def sample_file(self, item: Item, sample: int) -> Path:
        return self.folder / f"{item.name}-{sample}.mp4"

    def holds(self, item: Item, sample: int) -> bool:
        return is_whole_mp4(self.sample_file(item, sample))

    def clean(self) -> None:
        for part in self.waiting.glob("*.mp4"):
            part.unlink(missing_ok=True)

    def write(self, item: Item, sample: int, clip: tuple[Tensor, float]) -> None:
        if not self.holds(item, sample):
            number = self.items.index(item) * self.samples + sample
            write_mp4(self.sample_file(item, sample), self.waiting / f"{number}.{os.getpid()}.mp4", *clip)

    def finish(self, item: Item) -> None:
        with suppress(OSError):
            self.waiting.rmdir()


def is_whole_mp4(path: Path) -> bool:
    """Whether a file exists and is boxes (ISO/IEC 14496-12) to its last byte, `ftyp` first and `moov` among them."""
    try:
        with open(path, "rb") as file:
            end, place, kinds = os.fstat(file.fileno()).st_size, 0, []
            while place < end:
                file.seek(place)
                head = file.read(16)
                size = int.from_bytes(head[:4], "big")
                size = int.from_bytes(head[8:], "big") if size == 1 else size or end - place
                if len(head) < 8 or size < 8:
                    return False
                kinds.append(head[4:8])
                place += size
            return place == end and kinds[:1] == [b"ftyp"] and b"moov" in kinds
    except OSError:
        return False


def write_mp4(path: Path, part: Path, frames: Tensor, fps: float) -> None:
    """Encodes frames `(T, 3, H, W)` of 8 bits and even sides; the file gets its name when it is complete.

    Raises:
        UserError: the disk is full, the folder can't be written, or FFmpeg can't encode.
    """
    from torchcodec.encoders import VideoEncoder

    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        VideoEncoder(frames, frame_rate=fps).to_file(str(part), pixel_format="yuv420p")
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be written ({reason}); the videos that are complete stay") from error
