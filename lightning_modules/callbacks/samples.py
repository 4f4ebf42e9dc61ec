"""Pictures of samples, drawn from the same noise every time."""

from functools import cached_property

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from penstock.lightning_modules.callbacks.generation import EvaluationCallback, check_steps, generate, sources_for
from penstock.lightning_modules.callbacks.pictures import keep_picture, rendered, tiled
from penstock.lightning_modules.callbacks.ranks import gather_rows
from penstock.lightning_modules.callbacks.video_samples import FPS, keep_clips
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.steps import parse_steps

SHEET = 16


class SampleGrid(EvaluationCallback):
    """A grid of samples, one class per column: `samples/step_<global step>.png` in the run folder, and in the loggers.

    The noise depends on `seed` only, so that pictures of one run show the same samples improving. Small images are
    enlarged without smoothing. Points `(B, 2)` give a scatter plot. After `test` the file is `samples/test.png`, after
    `validate` `samples/validate.png`.

    Videos `(B, T, C, H, W)` give a GIF of the grid, `samples/step_<global step>.gif`, an MP4 beside it where torchcodec
    is installed, and a picture whose rows are the frames of the first 16. A module that takes text, and has no prompts
    by number, gets the first captions of the data, and of data with sources the first of these.
    """

    def __init__(
        self,
        rows: int = 8,
        cols: int = 10,
        steps: int | str = 20,
        every_n_validations: int = 1,
        seed: int = 0,
        fps: float = FPS,
    ):
        """Sets what is drawn.

        Args:
            rows: of the grid.
            cols: of the grid; column `c` holds class `c % num_classes` of a conditional module.
            steps: solver steps, a number or `bellman:K`.
            every_n_validations: 0 = only after `validate` and `test`.
            seed: of the noise.
            fps: frames per second of videos.

        Raises:
            UserError: for rows, cols or steps below 1, or fps of 0 or less.
        """
        super().__init__(every_n_validations)
        for name, value in {"rows": rows, "cols": cols}.items():
            if value < 1:
                raise UserError(f"{name}: {value} given, expected at least 1")
        if not 0 < fps < float("inf"):
            raise UserError(f"fps: {fps} given, expected frames per second above 0")
        parse_steps(steps)
        self.rows, self.cols, self.steps, self.seed, self.fps = rows, cols, steps, seed, fps

    @cached_property
    def state_key(self) -> str:
        """Differs between two of these in one run."""
        return self._generate_state_key(rows=self.rows, cols=self.cols, steps=self.steps, seed=self.seed)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses steps that the module can't take."""
        super().setup(trainer, pl_module, stage)
        check_steps(pl_module, self.steps)

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws on all ranks; rank 0 writes."""
        n = self.rows * self.cols
        columns = torch.arange(n) % self.cols
        labels = columns % pl_module.num_classes if pl_module.num_classes else None
        captioned = (
            labels is None and getattr(pl_module, "takes_text", False) and hasattr(trainer.datamodule, "prompts")
        )
        text = trainer.datamodule.prompts(n, "all")[0] if captioned else None
        context = trainer.precision_plugin.forward_context
        sources = sources_for(trainer, pl_module, "all")
        drawn = generate(pl_module, n, self.steps, self.seed, labels, context, text, sources=sources)
        chunks = [(s.index, s.data.float()) for s in drawn]
        own = tuple(torch.cat(column) for column in zip(*chunks)) or (torch.empty(0, dtype=torch.int64), None)
        rows = gather_rows(*own)
        if rows is None:
            return
        picture = draw(rows[1], self.cols, labels)
        names = {TrainerFn.TESTING: "test", TrainerFn.VALIDATING: "validate"}
        name = names.get(trainer.state.fn, f"step_{trainer.global_step:06d}")
        keep_picture(trainer, picture, name, "samples")
        if rows[1].ndim == 5:
            keep_clips(trainer, rows[1], self.cols, name, "samples_video", self.fps)


def draw(samples: Tensor, cols: int, labels: Tensor | None) -> Image.Image:
    """One picture of a set of samples; of videos, the frames of the first 16, a row each.

    Args:
        samples: images `(n, C, H, W)` or videos `(n, T, C, H, W)` in [-1, 1], or points `(n, 2)`.
        cols: images in a row.
        labels: `(n,)` for the colours of points; None = one colour.

    Raises:
        UserError: for samples of another shape.
    """
    if samples.ndim == 2 and samples.shape[1] == 2:
        return _scatter(samples, labels)
    if samples.ndim == 5:
        samples, cols = samples[:SHEET].flatten(0, 1), samples.shape[1]
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise UserError(
            f"SampleGrid: samples of shape {tuple(samples.shape[1:])}, expected (1 or 3, H, W), video or (2,)"
        )
    return Image.fromarray(tiled(samples, cols).permute(1, 2, 0).numpy())


def _scatter(points: Tensor, labels: Tensor | None) -> Image.Image:
    figure = Figure(figsize=(5, 5), dpi=100)
    axes = figure.add_subplot()
    x, y = points.numpy().T
    axes.scatter(x, y, s=4, c=None if labels is None else labels.numpy(), cmap=None if labels is None else "tab10")
    axes.set_aspect("equal", adjustable="datalim")
    return rendered(figure)
