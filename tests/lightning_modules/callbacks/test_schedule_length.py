"""Schedules that end before the training."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from penstock.lightning_modules.callbacks.schedule_length import ScheduleLength
from penstock.lightning_modules.schedules import LinearWarmup, WarmupCosine


class Line(pl.LightningModule):
    def __init__(self, schedule):
        super().__init__()
        self.weight, self.schedule = torch.nn.Parameter(torch.zeros(())), schedule

    def training_step(self, batch, batch_idx):
        return (self.weight - batch.mean()) ** 2

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([self.weight], lr=0.1)
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


@pytest.mark.parametrize(
    ("schedule", "options", "planned"),
    [
        (lambda o: WarmupCosine(o, total=5), {"max_epochs": 2}, 6),
        (lambda o: WarmupCosine(o, total=6), {"max_epochs": 2}, None),
        (lambda o: WarmupCosine(o, total=3), {"max_epochs": 4, "accumulate_grad_batches": 2}, 8),
        (lambda o: WarmupCosine(o, total=5), {"max_steps": 5}, None),
        (lambda o: LinearWarmup(o, warmup=1), {"max_epochs": 2}, None),
    ],
)
def test_a_short_schedule_is_said_once(schedule, options, planned, tmp_path, recwarn):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = False
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[ScheduleLength()], **quiet, **options)
    trainer.fit(Line(schedule), DataLoader(torch.ones(6, 1), batch_size=2))
    said = [str(one.message) for one in recwarn if "model.scheduler.total" in str(one.message)]
    assert len(said) == (planned is not None)
    for line in said:
        total = trainer.lr_scheduler_configs[0].scheduler.total
        assert f"found {total}, less than the {planned} updates that are planned" in line
        assert line.endswith(f"expected model.scheduler.total={planned}")
