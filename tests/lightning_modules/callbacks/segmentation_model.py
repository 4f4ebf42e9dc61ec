"""A segmenter whose masks are the marked ones with noise; as a script, one of two ranks."""

import json
import os
import sys
import warnings
from pathlib import Path

import fakes
import lightning.pytorch as pl
import torch

from penstock.datamodules.segmentation import Segmentation
from penstock.lightning_modules.callbacks.segmentation_metrics import SegmentationMetrics
from penstock.lightning_modules.callbacks.segmentation_pictures import SegmentationGallery


class Guesser(pl.LightningModule):
    """Of every image a part of the pixels is right, the same whatever the rank."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch, batch_idx):
        return (self.weight - 1) ** 2

    def validation_step(self, batch, batch_idx):
        found = batch["mask"].clone()
        for number, mask, (height, width) in zip(batch["index"].tolist(), found, batch["original_size"].tolist()):
            generator = torch.Generator().manual_seed(number)
            noise = torch.randint(0, 4, (height, width), generator=generator, dtype=torch.uint8)
            wrong = torch.rand(height, width, generator=generator) < 0.2 + 0.05 * (number % 5)
            mask[:height, :width] = torch.where(wrong, noise, mask[:height, :width].clamp(max=3))
        self.seen += batch["index"].tolist()
        return {"index": batch["index"], "mask": found}

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


def run(world: int, tree: Path, folder: Path) -> dict:
    """Logged values and the images that this rank saw."""
    module = Guesser()
    data = Segmentation(
        list("abcd"),
        data_dir=str(tree),
        reduce_zero_label=True,
        min_size=32,
        crop_size=32,
        batch_size=2,
        eval_batch_size=4,
    )
    settings = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer = fakes.quiet_trainer(
        folder,
        [SegmentationMetrics(), SegmentationGallery(5)],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, datamodule=data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"world": trainer.world_size, "found": found, "seen": module.seen}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    tree, out = map(Path, sys.argv[1:])
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(run(2, tree, out / "two")))
