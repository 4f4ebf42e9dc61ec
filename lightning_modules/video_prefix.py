"""What a video flow's samples begin with: a picture, a clip to go on from, a last frame, a clip to translate."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from penstock.datamodules.video_clips import fitted
from penstock.datamodules.video_readers import FRAME_SUFFIXES, open_video, readable
from penstock.datamodules.video_sources import VIDEO_SUFFIXES
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.prompt_template import Tag


@dataclass(frozen=True)
class Request:
    """What samples begin with, in the order of the sequence that the model is trained on: last, image, video.

    Attributes:
        image: File of a picture that is the first frame.
        video: File of a clip that the samples go on from.
        last: File of a picture that is the last frame.
        source: File of a clip that is translated to another of the same length, or such clips `(n, T, C, H, W)`.
        given: Frames that are taken of `video`, the first ones; None is all.
        fps: Rate at which frames of files are taken; None is the files' own frames.

    Raises:
        UserError: files that exclude each other, or a number out of range.
    """

    image: str | None = None
    video: str | None = None
    last: str | None = None
    source: str | Tensor | None = None
    given: int | None = None
    fps: float | None = None

    def __post_init__(self):
        if self.given is not None and (self.given < 1 or self.video is None):
            raise UserError(f"given={self.given}: expected a number of frames of video=FILE, at least 1")
        if self.fps is not None and not self.fps > 0:
            raise UserError(f"fps={self.fps}: expected frames per second above 0")
        for one, other in (("image", "video"), ("source", "image"), ("source", "video"), ("source", "last")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise UserError(f"{one}={getattr(self, one)} and {other}={getattr(self, other)}: expected one of them")

    @property
    def tag(self) -> Tag | None:
        """The task as captions tell it."""
        return "last" if self.last is not None else "v2v" if self.source is not None else None

    @property
    def hidden(self) -> bool:
        """Whether the known frames are no part of what is shown."""
        return self.source is not None

    def check(self, given: int, frames: int, window: int) -> None:
        """Refuses a beginning that leaves nothing to make, or that later windows would not see.

        Args:
            given: Frames that the files give, in the flow's space.
            frames: Of the whole sequence.
            window: Of the model.

        Raises:
            UserError: the file, what was found and what is expected.
        """
        named = {key: getattr(self, key) for key in ("image", "video", "last", "source")}
        named = {key: file for key, file in named.items() if file is not None}
        for key in ("last", "source"):
            if key in named and frames > window:
                raise UserError(f"{key}={_shown(named[key])}: {frames} frames, expected at most {window}, the window")
        if given >= min(frames, window):
            key, file = max(named.items(), key=lambda item: item[0] in ("video", "source"))
            most = min(frames, window) - 1
            if frames <= given and key != "video":
                raise UserError(
                    f"frames={frames}: {' and '.join(f'{k}={_shown(f)}' for k, f in named.items())} leaves none to "
                    f"make; expected {given + 1} or more"
                )
            cut = "; given=N takes the first N frames of the file" if key == "video" else ""
            raise UserError(f"{key}={_shown(file)}: {given} frames, expected at most {most} before the new ones{cut}")

    def known(
        self, pixels: tuple[int, int, int], autoencoder: Autoencoder, device: torch.device, frames: int
    ) -> Tensor | None:
        """The first frames `(1, K, C, H, W)`, or of given clips `(n, K, C, H, W)`, in the flow's space; or None.

        A source is half of the sequence: as many of a file's first frames as that takes.

        Args:
            pixels: `(C, H, W)` of a frame that is seen.
            autoencoder: To the flow's space; each file on its own.
            device: Of the result.
            frames: Of the whole sequence, in the flow's space.

        Raises:
            UserError: a file that cannot be read or is too short; it is named.
        """
        factor = autoencoder.frame_factor
        half = max(1, (frames // 2 - 1) * factor + 1)
        if isinstance(self.source, Tensor):
            return autoencoder.encode(self.source.to(device))
        if self.given is not None and (over := (self.given - 1) % factor):
            fewer = self.given - over
            raise UserError(
                f"given={self.given}: expected 1 more than a multiple of {factor}, as model.autoencoder takes frames "
                f"(did you mean {fewer} or {fewer + factor}?)"
            )
        files = [(self.last, 1), (self.image, 1), (self.video, self.given), (self.source, half)]
        parts = []
        for file, number in files:
            if file is not None:
                what = "the picture" if file in (self.last, self.image) else "the video"
                clip = read_clip(Path(file), pixels, number, self.fps, what)
                if over := (len(clip) - 1) % factor:
                    clip = clip[:-over]
                    rank_zero_warn(
                        f"{file}: the last {over} of {len(clip) + over} frames are left out; model.autoencoder takes 1 "
                        f"more than a multiple of {factor}"
                    )
                parts.append(autoencoder.encode(clip[None].to(device)))
        return torch.cat(parts, 1) if parts else None

    def shown(self, x: Tensor, known: int, autoencoder: Autoencoder) -> Tensor:
        """Clips that are seen `(B, T, C, H, W)` of those in the flow's space, whose first `known` frames were given."""
        if self.hidden:
            return autoencoder.decode(x[:, known:])
        if self.last is not None:
            return torch.cat([autoencoder.decode(x[:, 1:]), autoencoder.decode(x[:, :1])], 1)
        return autoencoder.decode(x)


def _shown(file: str | Tensor) -> str:
    return "the data's clips" if isinstance(file, Tensor) else file


def read_clip(
    path: Path,
    pixels: tuple[int, int, int],
    number: int | None = None,
    fps: float | None = None,
    what: str = "the video",
) -> Tensor:
    """The frames of a file or folder `(T, C, H, W)` in [-1, 1], cropped and resized.

    Args:
        path: Picture, video, or folder of frames.
        pixels: `(C, H, W)` of a frame.
        number: The first so many frames; None is all.
        fps: Rate at which they are taken; None is the file's own frames.
        what: What errors call it.

    Raises:
        UserError: it is absent, of no known kind, cannot be read, or has fewer frames.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a picture, a video or a folder of frames")
    kinds = (*FRAME_SUFFIXES, *VIDEO_SUFFIXES)
    if not path.is_dir() and path.suffix.lower() not in kinds:
        raise UserError(f"{path}: found '{path.suffix}', expected one of {' '.join(kinds)}, or a folder of frames")
    reader = open_video(path, frames_fps=fps or 1.0, what=what)
    channels, height, width = pixels
    count = reader.count if fps is None else math.ceil(reader.seconds * fps - 1e-3)
    if number is not None and count < number:
        rate = "" if fps is None else f" at {fps:g} fps"
        raise UserError(f"{path}: found {count} frames{rate}, expected at least {number}")
    rows = np.arange(count if number is None else number)
    with readable(path, what):
        frames = reader.frames(rows) if fps is None else reader.near(rows / fps)
    frames = fitted(frames.float() / 127.5 - 1, height, width).clamp(-1, 1)
    return frames.mean(1, keepdim=True) if channels == 1 else frames


def last_frame_first(video: Tensor, autoencoder: Autoencoder, factor: int, noise: Tensor | None) -> Tensor:
    """Clips `(B, T, C, H, W)` of pixels in the flow's space, after a frame of their end that is encoded on its own.

    The last `factor` frames are left out, the first of them is the one that leads, so that the flow sees as many frames
    as without it (arXiv 2511.20462, official code: a time factor of 4, frame -4).

    Args:
        video: Clips.
        autoencoder: To the flow's space.
        factor: Frames of pixels to one of the flow.
        noise: Of the encoder, shape of the result; None takes its mean.
    """
    lead, rest = video[:, -factor : video.shape[1] - factor + 1], video[:, :-factor]
    noises = (None, None) if noise is None else (noise[:, :1], noise[:, 1:])
    return torch.cat([autoencoder.encode(part, own) for part, own in zip((lead, rest), noises)], 1)
