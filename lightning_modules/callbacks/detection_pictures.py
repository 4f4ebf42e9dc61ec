"""Pictures of detected boxes beside those marked by hand."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2
from torchvision.utils import draw_bounding_boxes, make_grid

from penstock.lightning_modules.callbacks.pictures import keep_picture
from penstock.lightning_modules.callbacks.ranks import gather
from penstock.lightning_modules.errors import UserError

SIDE = 320  # pixels of the longer side of a picture in a gallery


def colours(labels: Tensor) -> list[tuple[int, int, int]]:
    """Of classes, the same in every picture."""
    found = colormaps["tab10"](labels.numpy() % 10)[:, :3] * 255
    return [tuple(int(x) for x in row) for row in found.round()]


def drawn(image: Tensor, boxes: Tensor, labels: Tensor, names: Sequence[str], scores: Tensor | None = None) -> Tensor:
    """Boxes with their classes on an image.

    Args:
        image: uint8 `(3, H, W)`.
        boxes: `(n, 4)` in its pixels.
        labels: int64 `(n,)`.
        names: Of the classes.
        scores: `(n,)`, written beside the class where they are given.

    Returns:
        uint8 `(3, H, W)`.
    """
    if not len(boxes):
        return image
    words = [names[label] for label in labels.tolist()]
    if scores is not None:
        words = [f"{word} {score:.2f}" for word, score in zip(words, scores.tolist())]
    width = max(1, round(max(image.shape[1:]) / 250))
    return draw_bounding_boxes(image, boxes, words, colors=colours(labels), width=width)


class DetectionGallery(pl.Callback):
    """Pairs of pictures, marked boxes and detected ones: `samples/step_<global step>.png` in the run folder (`test.png`
    after a test), and in the loggers; W&B gets the boxes themselves.

    The images are spread evenly over the split.

    Args:
        images: How many.
        score: Detected boxes of larger ones are drawn, in [0, 1].

    Raises:
        UserError: no image, or a score out of range.
    """

    def __init__(self, images: int = 8, score: float = 0.3):
        if images < 1:
            raise UserError(f"images: {images} given, expected at least 1")
        if not 0 <= score <= 1:
            raise UserError(f"score: {score} given, expected a number in [0, 1]")
        self.images, self.score = images, score

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        split = "test" if trainer.state.fn == TrainerFn.TESTING else "val"
        numbers = torch.as_tensor(trainer.datamodule.view(split).numbers)
        spread = torch.linspace(0, len(numbers) - 1, min(self.images, len(numbers))).round().long()
        self.wanted, self.found = set(numbers[spread].tolist()), []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict[str, Any], batch: dict, *_: int
    ) -> None:
        for row, number in enumerate(batch["index"].tolist()):
            if number in self.wanted:
                height, width = batch["size"][row].tolist()
                seen = ((batch["image"][row, :, :height, :width] + 1) * 127.5).round().to(torch.uint8).cpu()
                columns = (outputs[name][row].cpu() for name in ("boxes", "labels", "scores"))
                original = batch["original_size"][row].tolist()
                self.found.append((number, v2.resize(seen, original, antialias=True), *columns))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parts = gather(self.found)
        if parts is None or trainer.sanity_checking:
            return
        found = sorted({one[0]: one for part in parts for one in part}.values(), key=lambda one: one[0])
        if not found:
            return
        names = {TrainerFn.TESTING: "test", TrainerFn.VALIDATING: "validate"}
        name = names.get(trainer.state.fn, f"step_{trainer.global_step:06d}")
        data, pictures = trainer.datamodule, []
        targets = data.targets(torch.tensor([one[0] for one in found]))
        for (_, image, boxes, labels, scores), target in zip(found, targets):
            at = scores > self.score
            pictures.append(drawn(image, target["boxes"], target["labels"], data.class_names))
            pictures.append(drawn(image, boxes[at], labels[at], data.class_names, scores[at]))
        self._keep(trainer, pictures, name)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                boxes = [_for_wandb(*one[2:], data.class_names) for one in found]
                pixels = [one[1].permute(1, 2, 0).numpy() for one in found]
                logger.log_image("boxes", pixels, step=trainer.global_step, boxes=boxes)

    on_test_epoch_end = on_validation_epoch_end

    def _keep(self, trainer: pl.Trainer, pictures: list[Tensor], name: str) -> None:
        """One picture of all, four a row, scaled to one size."""
        height, width = (max(sides) for sides in zip(*(picture.shape[1:] for picture in pictures)))
        factor = SIDE / max(height, width)
        sheet = torch.full((len(pictures), 3, round(height * factor), round(width * factor)), 255, dtype=torch.uint8)
        for row, picture in zip(sheet, pictures):
            small = v2.resize(picture, [round(side * factor) for side in picture.shape[1:]], antialias=True)
            row[:, : small.shape[1], : small.shape[2]] = small
        grid = make_grid(sheet, nrow=4, padding=2)
        keep_picture(trainer, Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), name, "detections")


def _for_wandb(boxes: Tensor, labels: Tensor, scores: Tensor, names: Sequence[str]) -> dict[str, Any]:
    data = [
        {
            "position": dict(zip(("minX", "minY", "maxX", "maxY"), box)),
            "domain": "pixel",
            "class_id": label,
            "box_caption": f"{names[label]} {score:.2f}",
            "scores": {"score": score},
        }
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist())
    ]
    return {"predictions": {"box_data": data, "class_labels": dict(enumerate(names))}}
