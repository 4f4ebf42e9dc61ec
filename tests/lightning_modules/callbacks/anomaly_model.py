"""An anomaly model that returns what it is given, and its data; as a script, one of two ranks."""

import json
import os
import sys
import warnings
from pathlib import Path

import fakes
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from penstock.lightning_modules.calibration import Calibration
from penstock.lightning_modules.callbacks.anomaly_metrics import AnomalyMetrics

SIZE = (12, 16)


class Detector(pl.LightningModule):
    """Its map is the image, noisier in every epoch but the second; its score the largest value."""

    def __init__(self, noise=(2.0, 0.5, 3.0, 4.0)):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.calibration, self.noise = Calibration(), noise

    def training_step(self, batch, batch_idx):
        return (self.weight - 1) ** 2

    def predict_step(self, batch, batch_idx):
        noise = torch.stack(
            [torch.randn(SIZE, generator=torch.Generator().manual_seed(i)) for i in batch["index"].tolist()]
        )
        maps = batch["image"] + self.noise[self.current_epoch % len(self.noise)] * noise[:, None]
        return {"index": batch["index"], "score": maps.amax((1, 2, 3)), "map": maps}

    validation_step = test_step = predict_step

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


class Defects(pl.LightningDataModule):
    """Images that are 1 where they have a defect; ranks take every second one."""

    def __init__(self, n=30, anomalous=True, normal=True, masks=True, val_is_test=False):
        super().__init__()
        self.val_is_test = val_is_test
        generator = torch.Generator().manual_seed(0)
        mask = torch.zeros(n, 1, *SIZE, dtype=torch.uint8)
        for i in range(n):
            y, x = torch.randint(9, (2,), generator=generator).tolist()
            if anomalous and (i % 3 or not normal):
                mask[i, :, y : y + 3, x : x + 4] = 1
                mask[i, :, 0, 15] = 1
        self.columns = {"image": mask.float(), "label": mask.flatten(1).amax(1).long(), "index": torch.arange(n)}
        if masks:
            self.columns["mask"] = mask

    def val_dataloader(self):
        trainer = self.trainer
        rows = list(range(len(self.columns["index"])))[trainer.global_rank :: trainer.world_size]
        return DataLoader(fakes.Rows(self.columns, rows), batch_size=7)

    def train_dataloader(self):
        return DataLoader(fakes.Rows(self.columns, [0, 1]), batch_size=2)

    test_dataloader = val_dataloader


def run(world: int, folder: Path) -> dict:
    """Logged values and calibration of a fit and a test."""
    module, data, callback = Detector(), Defects(), AnomalyMetrics()
    settings = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer = fakes.quiet_trainer(folder, [callback], max_epochs=3, use_distributed_sampler=False, **settings)
    trainer.fit(module, datamodule=data)
    fitted = {name: float(value) for name, value in trainer.callback_metrics.items()}
    tested = trainer.test(module, datamodule=data, verbose=False)[0]
    calibration = [value.tolist() for value in module.calibration.buffers()]
    return {"world": trainer.world_size, "fit": fitted, "test": tested, "calibration": calibration}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    out = Path(sys.argv[1])
    found = run(2, out / "run")
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
