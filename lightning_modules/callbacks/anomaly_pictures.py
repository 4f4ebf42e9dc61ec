"""Pictures of anomaly maps: heat over the image, what lies above the threshold, what was marked by hand."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from penstock.lightning_modules.callbacks.pictures import keep_picture
from penstock.lightning_modules.callbacks.ranks import gather_rows
from penstock.lightning_modules.errors import UserError


def heat(images: Tensor, maps: Tensor, strength: float = 0.5) -> Tensor:
    """Images under the colours of their maps.

    Args:
        images: `(B, 1 or 3, H, W)` in [-1, 1].
        maps: `(B, 1, H, W)` in [0, 1].
        strength: Weight of the colours, in [0, 1].

    Returns:
        uint8 `(B, 3, H, W)`.
    """
    turbo = torch.tensor(colormaps["turbo"].colors, device=maps.device)
    colours = turbo[(maps[:, 0].float() * len(turbo)).long().clamp(0, len(turbo) - 1)].permute(0, 3, 1, 2)
    seen = images.to(maps.device, torch.float32).expand(-1, 3, -1, -1) * 0.5 + 0.5
    return ((1 - strength) * seen + strength * colours).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


class AnomalyGallery(pl.Callback):
    """Rows of image, marked mask, heat map and mask above the threshold: `samples/step_<global step>.png` in the run
    folder (`test.png` after a test), and in the loggers.

    The rows are spread evenly over the split, normal samples first, then by kind of defect. In the place of a mask that
    the data do not have, an anomalous image is white all over.

    Args:
        rows: How many.

    Raises:
        UserError: no row.
    """

    def __init__(self, rows: int = 12):
        if rows < 1:
            raise UserError(f"rows: {rows} given, expected at least 1")
        self.rows = rows

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        split = "test" if trainer.state.fn == TrainerFn.TESTING else "val"
        data = trainer.datamodule
        numbers = data.view(split).numbers
        numbers = torch.as_tensor(numbers[data.defect_of[numbers].argsort(kind="stable")])
        spread = torch.linspace(0, len(numbers) - 1, min(self.rows, len(numbers))).round().long()
        self.wanted, self.found = numbers[spread].to(pl_module.device), []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict[str, Tensor], batch: dict, *_: int
    ) -> None:
        mine = torch.isin(batch["index"], self.wanted).nonzero()[:, 0]
        if len(mine):
            mask = batch.get("mask", batch["label"].to(torch.uint8).view(-1, 1, 1, 1).expand_as(outputs["map"]))
            rows = (batch["index"], batch["image"], mask, outputs["map"])
            self.found.append(tuple(row[mine].cpu() for row in rows))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = tuple(torch.cat(column) for column in zip(*self.found))
        rows = gather_rows(*(columns or (torch.empty(0, dtype=torch.int64), None, None, None)))
        if rows is None or trainer.sanity_checking or not len(rows[0]):
            return
        wanted = self.wanted.cpu()
        order = torch.searchsorted(rows[0], wanted[torch.isin(wanted, rows[0])])
        names = {TrainerFn.TESTING: "test", TrainerFn.VALIDATING: "validate"}
        name = names.get(trainer.state.fn, f"step_{trainer.global_step:06d}")
        keep_picture(trainer, drawn(*(row[order] for row in rows[1:]), pl_module.calibration), name, "anomalies")

    on_test_epoch_end = on_validation_epoch_end


def drawn(images: Tensor, masks: Tensor, maps: Tensor, calibration: torch.nn.Module) -> Image.Image:
    """One row for each sample, in their order: image, mask, heat map, and mask above the threshold where there is one.

    Args:
        images: `(n, C, H, W)` in [-1, 1].
        masks: `(n, 1, H, W)` in {0, 1}.
        maps: `(n, 1, H, W)`.
        calibration: See `Calibration`.
    """
    seen = ((images.float().expand(-1, 3, -1, -1) * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    panels = [seen, (255 * masks).expand(-1, 3, -1, -1)]
    known = calibration.facts()
    if "map_range" in known:
        panels.append(heat(images, calibration.colours(maps)))
    else:
        low, high = maps.min(), maps.max()
        panels.append(heat(images, (maps - low) / (high - low).clamp(min=1e-12)))
    if "pixel_threshold" in known:
        panels.append(above(maps, calibration.pixel_threshold))
    rows = torch.stack([panel.to(torch.uint8) for panel in panels], 1).flatten(0, 1)
    return Image.fromarray(make_grid(rows, nrow=len(panels), padding=2).permute(1, 2, 0).numpy())


def above(maps: Tensor, threshold: Tensor) -> Tensor:
    """Where maps `(B, 1, H, W)` reach the threshold: 0 or 255, uint8 `(B, 3, H, W)`."""
    return (255 * (maps.double() >= threshold.to(maps.device))).to(torch.uint8).expand(-1, 3, -1, -1)
