"""Pictures of some images of a split, the same in every validation, from whatever rank has them."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from penstock.lightning_modules.callbacks.ranks import gather
from penstock.lightning_modules.errors import UserError

NAMES = {TrainerFn.TESTING: "test", TrainerFn.VALIDATING: "validate"}


class SpreadGallery(pl.Callback):
    """Collects what a subclass takes of images that are spread evenly over the split, and has it keep them on rank 0.

    A subclass has `take`, what is kept of a row of a batch, and `keep`, which gets it with the numbers of the images.

    Args:
        images: How many.

    Raises:
        UserError: no image.
    """

    def __init__(self, images: int):
        if images < 1:
            raise UserError(f"images: {images} given, expected at least 1")
        self.images = images

    def take(self, outputs: dict[str, Any], batch: dict[str, Any], row: int) -> tuple:
        """What is kept of a row, on the CPU."""
        raise NotImplementedError

    def keep(self, trainer: pl.Trainer, numbers: list[int], found: list[tuple], name: str) -> None:
        """Makes pictures of what was taken, called `name`."""
        raise NotImplementedError

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        split = "test" if trainer.state.fn == TrainerFn.TESTING else "val"
        numbers = torch.as_tensor(trainer.datamodule.view(split).numbers)
        spread = torch.linspace(0, len(numbers) - 1, min(self.images, len(numbers))).round().long()
        self.wanted, self.found = set(numbers[spread].tolist()), {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict[str, Any], batch: dict, *_: int
    ) -> None:
        for row, number in enumerate(batch["index"].tolist()):
            if number in self.wanted:
                self.found[number] = self.take(outputs, batch, row)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parts, self.found = gather(self.found), {}
        if parts is None or trainer.sanity_checking:
            return
        found = {number: one for part in parts for number, one in part.items()}
        if numbers := sorted(found):
            name = NAMES.get(trainer.state.fn, f"step_{trainer.global_step:06d}")
            self.keep(trainer, numbers, [found[number] for number in numbers], name)

    on_test_epoch_end = on_validation_epoch_end
