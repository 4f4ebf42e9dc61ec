"""Where pictures of a run go: its folder and its loggers."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, uint8
from torchvision.utils import make_grid

TILE = 64


def keep_picture(trainer: pl.Trainer, picture: Image.Image, name: str, tag: str) -> None:
    """Writes `samples/<name>.png` in the run folder, and sends the picture to every logger that takes images as `tag`.

    Call it on rank 0 only.
    """
    folder = Path(trainer.default_root_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.png")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(tag, [picture], step=trainer.global_step)
        elif hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(tag, np.asarray(picture), trainer.global_step, dataformats="HWC")


def tiled(images: Tensor, cols: int) -> Tensor:
    """Images `(n, 1 or 3, H, W)` in [-1, 1] side by side, uint8 `(3, H', W')`; small ones enlarged, unsmoothed."""
    factor = max(1, TILE // max(images.shape[-2:]))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(uint8)
    pixels = pixels.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)
    return make_grid(pixels, nrow=cols, padding=2)


def rendered(figure: Figure) -> Image.Image:
    """A Matplotlib figure as an RGB image."""
    figure.tight_layout()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
