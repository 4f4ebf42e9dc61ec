"""Pictures of classified pixels beside those marked by hand."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2
from torchvision.utils import make_grid

from penstock.lightning_modules.callbacks.pictures import keep_picture
from penstock.lightning_modules.callbacks.spread_gallery import SpreadGallery
from penstock.lightning_modules.class_masks import IGNORED

SIDE = 256  # pixels of the longer side of a picture in a gallery


def palette() -> np.ndarray:
    """uint8 `(256, 3)`, RGB of each class, the same everywhere: Pascal VOC's colours, black first; white if ignored."""
    numbers, colours = np.arange(256), np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    colours[IGNORED] = 255
    return colours


def coloured(mask: Tensor) -> Tensor:
    """uint8 `(3, H, W)` of classes `(H, W)`."""
    return torch.from_numpy(palette())[mask.long()].permute(2, 0, 1)


class SegmentationGallery(SpreadGallery):
    """Images with their marked classes and those found, three pictures in a row, two images a line:
    `samples/step_<global step>.png` in the run folder (`test.png` after a test), and in the loggers; W&B gets the masks
    themselves.

    The images are spread evenly over the split. Steps return `mask` `(B, H, W)`.

    Args:
        images: How many.

    Raises:
        UserError: no image.
    """

    def __init__(self, images: int = 8):
        super().__init__(images)

    def take(self, outputs: dict[str, Any], batch: dict[str, Any], row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The image as it was, its marked classes and those found."""
        (height, width), (rows, columns) = (batch[key][row].tolist() for key in ("size", "original_size"))
        pixels = ((batch["image"][row, :, :height, :width] + 1) * 127.5).round().to(torch.uint8).cpu()
        masks = (masks[row, :rows, :columns].cpu() for masks in (batch["mask"], outputs["mask"]))
        return v2.resize(pixels, [rows, columns], antialias=True), *masks

    def keep(self, trainer: pl.Trainer, numbers: list[int], found: list[tuple], name: str) -> None:
        """One picture of all, and the masks."""
        keep_picture(trainer, _sheet(found), name, "segments")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                masks = [_for_wandb(*row[1:], trainer.datamodule.class_names) for row in found]
                pixels = [row[0].permute(1, 2, 0).numpy() for row in found]
                logger.log_image("masks", pixels, step=trainer.global_step, masks=masks)


def _sheet(rows: list[tuple[Tensor, Tensor, Tensor]]) -> Image.Image:
    """One picture of images, marked and found classes, scaled to one size."""
    longest = max(side for image, *_ in rows for side in image.shape[1:])
    tiles = []
    for image, *masks in rows:
        size = [max(round(side * SIDE / longest), 1) for side in image.shape[1:]]
        small = (v2.resize(mask[None], size, interpolation=InterpolationMode.NEAREST_EXACT)[0] for mask in masks)
        tiles += [v2.resize(image, size, antialias=True), *map(coloured, small)]
    height, width = (max(sides) for sides in zip(*(tile.shape[1:] for tile in tiles)))
    sheet = torch.full((len(tiles), 3, height, width), 255, dtype=torch.uint8)
    for place, tile in zip(sheet, tiles):
        place[:, : tile.shape[1], : tile.shape[2]] = tile
    grid = make_grid(sheet, nrow=6, padding=2, pad_value=128)
    return Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())


def _for_wandb(truth: Tensor, found: Tensor, names: list[str]) -> dict[str, Any]:
    labels = {**dict(enumerate(names)), IGNORED: "ignored"}
    masks = {"ground_truth": truth, "predictions": found}
    return {name: {"mask_data": mask.numpy(), "class_labels": labels} for name, mask in masks.items()}
