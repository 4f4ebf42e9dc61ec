"""Pictures of detected boxes beside those marked by hand."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from penstock.lightning_modules.callbacks.pictures import keep_picture
from penstock.lightning_modules.callbacks.spread_gallery import SpreadGallery
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import Rle, decoded

SIDE = 320  # pixels of the longer side of a picture in a gallery
INK = 0.45  # opacity of masks
LETTER = 11  # pixels of the height of letters, at least


def colours(labels: Tensor) -> list[tuple[int, int, int]]:
    """Of classes, the same in every picture."""
    found = colormaps["tab10"](labels.numpy() % 10)[:, :3] * 255
    return [tuple(int(x) for x in row) for row in found.round()]


def drawn(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    masks: Sequence[Rle] | None = None,
) -> Tensor:
    """Boxes with their classes on an image, each class on a patch of its colour, the first boxes on top, over masks.

    Args:
        image: uint8 `(3, H, W)`.
        boxes: `(n, 4)` in its pixels.
        labels: int64 `(n,)`.
        names: Of the classes.
        scores: `(n,)`, written beside the class where they are given.
        masks: Of the boxes, of any one size.

    Returns:
        uint8 `(3, H, W)`.
    """
    if not len(boxes):
        return image
    if masks is not None:
        inked = v2.resize(tv_tensors.Mask(decoded(masks, masks[0]["size"])), list(image.shape[1:])).bool()
        image = draw_segmentation_masks(image, inked.as_subclass(Tensor), alpha=INK, colors=colours(labels))
    boxes, labels = boxes.flip(0), labels.flip(0)
    words = [names[label] for label in labels.tolist()]
    if scores is not None:
        words = [f"{word} {score:.2f}" for word, score in zip(words, scores.flip(0).tolist())]
    width = max(2, round(max(image.shape[1:]) / 250))
    framed = draw_bounding_boxes(image, boxes, colors=colours(labels), width=width)
    picture = Image.fromarray(framed.permute(1, 2, 0).contiguous().numpy())
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(LETTER, round(max(image.shape[1:]) / 45)))
    for word, (x, y, *_), colour in zip(words, boxes.tolist(), colours(labels)):
        left, top, right, bottom = pen.textbbox((0, 0), word, font)
        wide, high = right - left + 4, bottom - top + 4
        x = max(min(x, picture.width - wide), 0)
        y = y - high if y >= high else max(y, 0)  # above the box, or in it where the picture ends
        pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        pen.text((x + 2 - left, y + 2 - top), word, "black" if light else "white", font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class DetectionGallery(SpreadGallery):
    """Pairs of pictures, marked boxes and detected ones: `samples/step_<global step>.png` in the run folder (`test.png`
    after a test), and in the loggers; W&B gets the boxes themselves, of both kinds, detected ones of any score.

    The images are spread evenly over the split.

    Args:
        images: How many.
        score: Detected boxes of larger ones are drawn, in [0, 1].

    Raises:
        UserError: no image, or a score out of range.
    """

    def __init__(self, images: int = 8, score: float = 0.3):
        super().__init__(images)
        if not 0 <= score <= 1:
            raise UserError(f"score: {score} given, expected a number in [0, 1]")
        self.score = score

    def take(self, outputs: dict[str, Any], batch: dict[str, Any], row: int) -> tuple:
        """The image as it was, boxes, classes, scores and masks, if there are any."""
        height, width = batch["size"][row].tolist()
        seen = ((batch["image"][row, :, :height, :width] + 1) * 127.5).round().to(torch.uint8).cpu()
        columns = (outputs[name][row].cpu() for name in ("boxes", "labels", "scores"))
        masks = outputs["masks"][row] if "masks" in outputs else None
        return v2.resize(seen, batch["original_size"][row].tolist(), antialias=True), *columns, masks

    def keep(self, trainer: pl.Trainer, numbers: list[int], found: list[tuple], name: str) -> None:
        """One picture of all, and the boxes."""
        targets = trainer.datamodule.targets(torch.tensor(numbers))
        self._draw(trainer, found, targets, name)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                names = trainer.datamodule.class_names
                boxes = [_for_wandb(target, one[1:4], names) for one, target in zip(found, targets)]
                pixels = [one[0].permute(1, 2, 0).numpy() for one in found]
                logger.log_image("boxes", pixels, step=trainer.global_step, boxes=boxes)

    def _draw(self, trainer: pl.Trainer, found: list[tuple], targets: list[dict[str, Tensor]], name: str) -> None:
        """One picture of all, four a row, scaled to one size before boxes are drawn."""
        names = trainer.datamodule.class_names
        height, width = (max(sides) for sides in zip(*(image.shape[1:] for image, *_ in found)))
        factor = SIDE / max(height, width)
        sheet = torch.full((2 * len(found), 3, round(height * factor), round(width * factor)), 255, dtype=torch.uint8)
        for k, ((image, boxes, labels, scores, masks), target) in enumerate(zip(found, targets)):
            at, size = scores > self.score, [max(1, round(side * factor)) for side in image.shape[1:]]
            small = v2.resize(image, size, antialias=True)
            marked = drawn(small, target["boxes"] * factor, target["labels"], names, masks=target.get("masks"))
            detected = drawn(small, boxes[at] * factor, labels[at], names, scores[at], chosen(masks, at))
            for row, picture in zip(sheet[2 * k :], (marked, detected)):
                row[:, : size[0], : size[1]] = picture
        grid = make_grid(sheet, nrow=4, padding=2)
        keep_picture(trainer, Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), name, "detections")


def chosen(masks: Sequence[Rle] | None, at: Tensor) -> list[Rle] | None:
    """The masks where `at` `(n,)` is true; None of detectors without."""
    return None if masks is None else [mask for mask, wanted in zip(masks, at.tolist()) if wanted]


def _for_wandb(target: dict[str, Tensor], found: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Marked and detected boxes as `wandb.Image` takes them.

    Args:
        target: `boxes` and `labels`.
        found: Boxes, labels and scores.
        names: Of the classes.
    """
    marked = [
        _for_wandb_one(*row, names[row[1]]) for row in zip(*(target[key].tolist() for key in ("boxes", "labels")))
    ]
    detected = [
        _for_wandb_one(box, label, f"{names[label]} {score:.2f}") | {"scores": {"score": score}}
        for box, label, score in zip(*(column.tolist() for column in found))
    ]
    kinds = {"ground_truth": marked, "predictions": detected}
    return {kind: {"box_data": rows, "class_labels": dict(enumerate(names))} for kind, rows in kinds.items()}


def _for_wandb_one(box: list[float], label: int, caption: str) -> dict[str, Any]:
    position = dict(zip(("minX", "minY", "maxX", "maxY"), box))
    return {"position": position, "domain": "pixel", "class_id": label, "box_caption": caption}
