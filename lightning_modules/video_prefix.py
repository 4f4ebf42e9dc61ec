"""What a video flow's samples begin with: a picture, a clip to go on from, a last frame, a clip to translate."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.datamodules.video_clips import fitted
from penstock.datamodules.video_readers import open_video
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.prompt_template import Tag


@dataclass(frozen=True)
class Request:
    """Files that samples begin with, in the order of the sequence that the model is trained on: last, image, video.

    Attributes:
        image: Picture that is the first frame.
        video: Clip that the samples go on from.
        last: Picture that is the last frame.
        source: Clip that is translated to another of the same length.

    Raises:
        UserError: files that exclude each other.
    """

    image: str | None = None
    video: str | None = None
    last: str | None = None
    source: str | None = None

    def __post_init__(self):
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
        named = {key: file for key, file in vars(self).items() if file is not None}
        for key in ("last", "source"):
            if key in named and frames > window:
                raise UserError(f"{key}={named[key]}: {frames} frames, expected at most {window}, the window")
        if given >= min(frames, window):
            key, file = max(named.items(), key=lambda item: item[0] in ("video", "source"))
            most = min(frames, window) - 1
            raise UserError(f"{key}={file}: {given} frames, expected at most {most} before the new ones")

    def known(self, pixels: tuple[int, int, int], autoencoder: Autoencoder, device: torch.device) -> Tensor | None:
        """The first frames `(1, K, C, H, W)` in the flow's space, or None.

        Args:
            pixels: `(C, H, W)` of a frame that is seen.
            autoencoder: To the flow's space; each file on its own.
            device: Of the result.

        Raises:
            UserError: a file that cannot be read; it is named.
        """
        files = [(self.last, True), (self.image, True), (self.video, False), (self.source, False)]
        parts = [read_clip(Path(file), pixels, still).to(device) for file, still in files if file is not None]
        return torch.cat([autoencoder.encode(part[None]) for part in parts], 1) if parts else None

    def shown(self, x: Tensor, known: int, autoencoder: Autoencoder) -> Tensor:
        """Clips that are seen `(B, T, C, H, W)` of those in the flow's space, whose first `known` frames were given."""
        if self.hidden:
            return autoencoder.decode(x[:, known:])
        if self.last is not None:
            return torch.cat([autoencoder.decode(x[:, 1:]), autoencoder.decode(x[:, :1])], 1)
        return autoencoder.decode(x)


def read_clip(path: Path, pixels: tuple[int, int, int], still: bool) -> Tensor:
    """The frames of a file or folder `(T, C, H, W)` in [-1, 1], cropped and resized; a still is its first frame.

    Raises:
        UserError: it is absent or cannot be read.
    """
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a picture, a video or a folder of frames")
    reader = open_video(path)
    channels, height, width = pixels
    frames = reader.frames(torch.arange(1 if still else reader.count).numpy())
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
