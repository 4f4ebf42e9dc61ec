import time

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from penstock.lightning_modules.callbacks.throughput import Throughput, peak_memory


@pytest.fixture
def slow_run(fakes, tmp_path):
    def run(callback, folder="run", **settings):
        module, data = fakes.digits_module_and_data()

        def step(batch, batch_idx):
            time.sleep(0.02)
            return (module.weight - 1) ** 2

        def validate(batch, batch_idx):
            time.sleep(0.2)

        module.training_step, module.validation_step = step, validate
        logger = CSVLogger(tmp_path, name=folder)
        trainer = fakes.quiet_trainer(tmp_path, [callback], logger=logger, **settings)
        trainer.fit(module, datamodule=data)
        return trainer, module, data

    return run


def test_speed_and_training_time_leave_validation_out(slow_run):
    callback = Throughput()
    trainer, _, _ = slow_run(callback, val_check_interval=4, max_epochs=2)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert 0.32 <= values["train_seconds"] < 0.6
    assert values["train_seconds"] == pytest.approx(callback.train_seconds)
    assert 25 < values["throughput/steps_per_second"] <= 50
    assert values["throughput/samples_per_second"] == pytest.approx(8 * values["throughput/steps_per_second"])
    assert values["throughput/peak_memory_gib"] == pytest.approx(peak_memory(torch.device("cpu")) / 2**30, rel=0.2)


def test_logged_as_often_as_the_trainer_logs(slow_run):
    trainer, _, _ = slow_run(Throughput())
    rows = trainer.logger.experiment.metrics
    lines = open(f"{trainer.logger.log_dir}/metrics.csv").read().splitlines() if not rows else rows
    logged = [line for line in lines[1:] if line.split(",")[lines[0].split(",").index("throughput/steps_per_second")]]
    assert len(logged) == 2


def test_a_resumed_run_counts_on(slow_run, fakes, tmp_path):
    trainer, module, data = slow_run(Throughput())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = float(trainer.callback_metrics["train_seconds"])
    callback = Throughput()
    trainer = fakes.quiet_trainer(tmp_path, [callback], max_epochs=2)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert callback.train_seconds >= before + 0.16
