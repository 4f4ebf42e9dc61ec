"""The clips that a text-to-video benchmark is scored on, in the folder that its official scorer reads."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import pad

from penstock.lightning_modules.callbacks.benchmark_images import BenchmarkImages
from penstock.lightning_modules.callbacks.benchmark_mp4 import Videos
from penstock.lightning_modules.errors import UserError

FPS = 8.0


class BenchmarkVideos(BenchmarkImages):
    """Writes what `predict_step` returns under `video` for `BenchmarkPrompts`, one MP4 a sample; else as pictures.

    VBench gets `<folder>/<prompt>-0.mp4` to `<prompt>-4.mp4`, and nothing else in the folder, at 8 frames per second as
    it samples other models. Clips of odd sides get a black line; grey ones become RGB. Where a flow is inverted up to a
    tolerance over the whole batch, batches and ranks change a clip by as much.

    Args:
        folder: for the clips; None is `<format>` in the run folder.
        steps: of the module's `predict_step` (its `predict_steps`); None leaves them.
        fps: frames per second.

    Raises:
        UserError: `steps` below 1, or `fps` of 0 or less.
    """

    entry, data, noun, layouts = "video", "data=vbench", "videos", {"videos": Videos}

    def __init__(self, folder: str | None = None, steps: int | None = None, fps: float = FPS):
        super().__init__(folder, steps)
        if not 0 < fps < float("inf"):
            raise UserError(f"fps: {fps} given, expected frames per second above 0")
        self.fps = fps

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """As for pictures; looks for the encoder, too.

        Raises:
            UserError: torchcodec is not installed.
        """
        if stage != "predict":
            return
        try:
            from torchcodec.encoders import VideoEncoder  # noqa: F401
        except ImportError as error:
            raise UserError(
                "BenchmarkVideos: MP4 files are written by torchcodec, which is not installed; expected "
                "pip install 'penstock[video]'"
            ) from error
        super().setup(trainer, pl_module, stage)

    def drawn(self, samples: Tensor) -> list[tuple[Tensor, float]]:
        """Frames `(T, 3, H, W)`, uint8, and their rate, of each clip.

        Raises:
            UserError: samples that are no clips of one or three channels.
        """
        if samples.ndim != 5 or samples.shape[2] not in (1, 3):
            raise UserError(f"BenchmarkVideos: samples of shape {tuple(samples.shape[1:])}, expected (T, 1 or 3, H, W)")
        height, width = samples.shape[-2:]
        pixels = ((samples.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        pixels = pad(pixels.expand(-1, -1, 3, -1, -1), (0, width % 2, 0, height % 2))
        return [(clip.contiguous(), self.fps) for clip in pixels]

    def identity(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What the clips depend on, the rate among it."""
        return super().identity(trainer, pl_module) | {"fps": self.fps}
