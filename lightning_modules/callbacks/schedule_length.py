"""Warns of a learning-rate schedule that ends before the training does."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn


class ScheduleLength(Callback):
    """At the start of a fit, once: schedules by updates whose `total` is less than the updates that are planned."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        planned = trainer.estimated_stepping_batches
        for config in trainer.lr_scheduler_configs:
            total = getattr(config.scheduler, "total", None)
            if total is not None and config.interval == "step" and total < planned < math.inf:
                rank_zero_warn(
                    f"model.scheduler.total: found {total}, less than the {planned} updates that are planned; the "
                    f"learning rate stays at its last value from update {total} on; expected "
                    f"model.scheduler.total={planned}"
                )
