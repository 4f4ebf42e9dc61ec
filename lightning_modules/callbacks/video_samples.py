"""Grids of sample clips as moving pictures: a GIF always, an MP4 where torchcodec (extra `video`) can write one."""

import re
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from penstock.lightning_modules.callbacks.pictures import tiled

FPS = 8.0


def save_clips(samples: Tensor, cols: int, stem: Path, fps: float = FPS) -> Path:
    """Writes clips side by side as `<stem>.gif`, and as `<stem>.mp4` where torchcodec is installed.

    Small clips are enlarged as pictures are. Frames of a GIF last a multiple of 0.01 s, which rounds `fps`.

    Args:
        samples: `(n, T, C, H, W)` in [-1, 1], C = 1 or 3.
        cols: clips in a row.
        stem: path without its ending, in a folder that exists.
        fps: frames per second.

    Returns:
        The MP4, or the GIF where there is none.
    """
    frames = torch.stack([tiled(images, cols) for images in samples.float().cpu().unbind(1)])
    height, width = frames.shape[-2:]
    frames = pad(frames, (0, width % 2, 0, height % 2))
    gif = stem.with_name(f"{stem.name}.gif")
    first, *rest = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames)
    first.save(gif, save_all=True, append_images=rest, duration=max(1, round(100 / fps)) * 10, loop=0)
    mp4 = stem.with_name(f"{stem.name}.mp4")
    return mp4 if _encoded(frames, mp4, fps) else gif


def keep_clips(trainer: pl.Trainer, samples: Tensor, cols: int, name: str, tag: str, fps: float) -> None:
    """Writes `samples/<name>.gif` (and `.mp4`) in the run folder; sends it to every logger that takes videos as `tag`.

    Call it on rank 0 only.
    """
    folder = Path(trainer.default_root_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    path = save_clips(samples, cols, folder / name, fps)
    for logger in trainer.loggers:
        if hasattr(logger, "log_video"):
            logger.log_video(tag, [str(path)], step=trainer.global_step)


def reason(error: Exception) -> str:
    """The first sentence of what torchcodec says, without places in its files and without FFmpeg's own advice."""
    text = re.sub(r"\S*/\S+(:\d+)?:? ?", "", " ".join(str(error).split()))
    return re.split(r"(?<=\w)[.:] ", text)[0].rstrip(".: ") or type(error).__name__


def _encoded(frames: Tensor, path: Path, fps: float) -> bool:
    """Whether torchcodec is there and wrote frames `(T, 3, H, W)` of 8 bits and even sides."""
    try:
        from torchcodec.encoders import VideoEncoder
    except ImportError:
        return False
    try:
        VideoEncoder(frames.contiguous(), frame_rate=fps).to_file(str(path), pixel_format="yuv420p")
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        rank_zero_warn(f"{path.name} is not written, the GIF beside it is: torchcodec cannot encode ({reason(error)})")
        return False
    return True
