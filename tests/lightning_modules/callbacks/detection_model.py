"""A detector whose boxes are the objects, moved about, and data whose ranks share an odd number of images; as a script,
one of two ranks."""

import json
import os
import sys
import warnings
from pathlib import Path

import fakes
import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from penstock.datamodules.detection import Detection
from penstock.lightning_modules.callbacks.detection_metrics import DetectionMetrics
from penstock.lightning_modules.callbacks.inference_cost import InferenceCost


class Mover(pl.LightningModule):
    """Finds the objects of an image roughly, as roughly as the epoch is noisy, and things that are none; in one image
    nothing."""

    def __init__(self, noise=(1.5,)):
        super().__init__()
        self.weight, self.noise = torch.nn.Parameter(torch.zeros(())), noise
        self.seen: list[int] = []

    def training_step(self, batch, batch_idx):
        return (self.weight - 1) ** 2

    def validation_step(self, batch, batch_idx):
        self.seen += batch["index"].tolist()
        found = [self.found(number, target) for number, target in self.targets(batch["index"])]
        return {"index": batch["index"], **{name: [one[name] for one in found] for name in found[0]}}

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return {"index": batch["index"]}

    def targets(self, index):
        return zip(index.tolist(), self.trainer.datamodule.targets(index))

    def found(self, number, target):
        generator = torch.Generator().manual_seed(number)
        n = len(target["boxes"])
        moved = (
            target["boxes"] + torch.randn(n, 4, generator=generator) * self.noise[self.current_epoch % len(self.noise)]
        )
        low = torch.rand(2, 2, generator=generator) * 30
        boxes = torch.cat([moved, torch.cat([low, low + 9], 1)])
        labels = torch.cat([target["labels"], torch.randint(0, 3, (2,), generator=generator)])
        kept = slice(0, 0) if number == 22 else slice(None)
        return {"boxes": boxes[kept], "labels": labels[kept], "scores": torch.rand(n + 2, generator=generator)[kept]}

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


class Padded(Detection):
    """Test images are shared as PyTorch does: the first ones come twice where they do not divide."""

    def test_dataloader(self):
        view = self.view("test")
        rank, world = self.ranks
        rows = list(DistributedSampler(view, world, rank, shuffle=False)) if world > 1 else range(len(view))
        return DataLoader([view.fetch(np.array([row])) for row in rows], batch_size=None)


def run(world: int, tree: Path, folder: Path) -> dict:
    """Logged values and the images that this rank saw."""
    module, data = Mover(), Padded("mine", str(tree), min_size=64, max_size=128, batch_size=2, eval_batch_size=4)
    settings = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer = fakes.quiet_trainer(
        folder,
        [DetectionMetrics(), InferenceCost(runs=1)],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, datamodule=data)
    fitted, seen = {name: float(value) for name, value in trainer.callback_metrics.items()}, module.seen
    module.seen = []
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    return {"world": trainer.world_size, "fit": fitted, "test": tested, "val_seen": seen, "test_seen": module.seen}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    tree, out = map(Path, sys.argv[1:])
    found = run(2, tree, out / "two")
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
