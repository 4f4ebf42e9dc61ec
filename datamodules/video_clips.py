"""Clips of videos: where they begin, how they are read, cropped and resized."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from penstock.datamodules.video_readers import Place, Seek, open_video, readable
from penstock.datamodules.video_sources import Scene
from penstock.lightning_modules.errors import UserError


def fitted(frames: Tensor, height: int, width: int) -> Tensor:
    """The central part of frames `(n, 3, H, W)` that has the ratio asked for, resized (bicubic, antialiased)."""
    scale = min(frames.shape[-2] / height, frames.shape[-1] / width)
    tall, wide = round(height * scale), round(width * scale)
    top, left = (frames.shape[-2] - tall) // 2, (frames.shape[-1] - wide) // 2
    part = frames[..., top : top + tall, left : left + wide]
    if part.shape[-2:] == (height, width):
        return part.contiguous()
    return interpolate(part.contiguous(), (height, width), mode="bicubic", antialias=True)


@dataclass(frozen=True)
class Sampling:
    """How clips are taken from a video.

    Attributes:
        frames: of a clip.
        fps: of a clip; None = the video's own frames, one after the other.
        frames_fps: rate of folders of frames.
        stride: frames from the start of one clip to that of the next.
        first_only: only the first clip of a video.
        seek: how video files are searched.
    """

    frames: int
    fps: float | None
    frames_fps: float
    stride: int
    first_only: bool
    seek: Seek

    def spot(self, scene: Scene) -> tuple[float, int, float]:
        """Where a scene's frames begin, how many there are at this rate, and width / height.

        The beginning is a number of frames, or seconds where there is an fps. A scene with a source has as many frames
        as both have.

        Raises:
            UserError: unreadable, or shorter than a clip.
        """
        origin, count, ratio = self._spot(scene, scene.path)
        if scene.source is not None:
            count = min(count, self._spot(scene, scene.source)[1])
        return origin, count, ratio

    def _spot(self, scene: Scene, place: Place) -> tuple[float, int, float]:
        video = open_video(place, frames_fps=self.frames_fps, seek=self.seek)
        end = video.seconds if scene.end is None else min(scene.end, video.seconds)
        if self.fps is None:
            origin = video.first_from(scene.start)
            count = (video.count if scene.end is None else min(video.first_from(end), video.count)) - origin
        else:
            origin, count = scene.start, int(np.ceil((end - scene.start) * self.fps - 1e-3))
        if count < self.frames:
            rate = "" if self.fps is None else f" at {self.fps:g} fps"
            raise UserError(
                f"{place}: found {max(count, 0)} frames{rate}, expected at least {self.frames} (data.frames)"
            )
        return origin, count, video.width / video.height

    def starts(self, count: int) -> range:
        """First frames of the clips of a scene of `count` frames."""
        return range(0, 1 if self.first_only else count - self.frames + 1, self.stride)

    def read(self, place: Place, origin: float, first: int) -> Tensor:
        """The clip that begins at frame `first` of a scene's video or source, uint8 `(frames, 3, H, W)`.

        Raises:
            UserError: unreadable; the file is named.
        """
        video = open_video(place, frames_fps=self.frames_fps, seek=self.seek)
        rows = first + np.arange(self.frames)
        with readable(place, "the video"):
            return video.frames(int(origin) + rows) if self.fps is None else video.near(origin + rows / self.fps)


class ClipStore:
    """Clips of videos under one numbering, decoded on demand.

    Args:
        scenes: the videos.
        origins: beginning of each scene, see `Sampling.spot`.
        scene: int64 `(n,)` scene of each clip.
        first: int64 `(n,)` its first frame in it.
        sizes: (height, width) of each bucket.
        buckets: int64 `(n,)` bucket of each clip; clips fetched together have the same.
        sampling: how they are read.
    """

    def __init__(
        self,
        scenes: list[Scene],
        origins: list[float],
        scene: np.ndarray,
        first: np.ndarray,
        sizes: list[tuple[int, int]],
        buckets: np.ndarray,
        sampling: Sampling,
    ) -> None:
        self.scenes, self.origins, self.scene, self.first = scenes, origins, scene, first
        self.sizes, self.buckets, self.sampling = sizes, buckets, sampling

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        """Clips `video` with `text`, and where scenes have one `source`, of the same size."""
        scenes = [self.scenes[self.scene[n]] for n in numbers]
        clips = zip(*([self._clip(n, place) for place in scene.places] for n, scene in zip(numbers, scenes)))
        return {**dict(zip(("video", "source"), map(torch.stack, clips))), "text": [scene.text for scene in scenes]}

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""

    def sources(self, numbers: np.ndarray) -> Tensor:
        """Sources of clips, all in the first of the sizes."""
        scenes = [self.scenes[self.scene[n]] for n in numbers]
        return torch.stack([self._clip(n, scene.source, 0) for n, scene in zip(numbers, scenes)])

    def _clip(self, number: int, place: Place, bucket: int | None = None) -> Tensor:
        frames = self.sampling.read(place, self.origins[self.scene[number]], int(self.first[number]))
        return fitted(frames, *self.sizes[self.buckets[number] if bucket is None else bucket])
