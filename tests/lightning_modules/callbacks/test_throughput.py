import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from penstock.lightning_modules.callbacks import throughput
from penstock.lightning_modules.callbacks.throughput import Throughput, peak_memory


@pytest.fixture
def timed_run(fakes, tmp_path, monkeypatch):
    """A run by a clock of its own: a training step takes 0.02 s, a validation batch 0.2 s, all else nothing."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def run(callback, folder="run", **settings):
        module, data = fakes.digits_module_and_data()

        def step(batch, batch_idx):
            clock.now += 0.02
            return (module.weight - 1) ** 2

        def validate(batch, batch_idx):
            clock.now += 0.2

        module.training_step, module.validation_step = step, validate
        logger = CSVLogger(tmp_path, name=folder)
        trainer = fakes.quiet_trainer(tmp_path, [callback], logger=logger, **settings)
        trainer.fit(module, datamodule=data)
        return trainer, module, data

    return run


def readings(trainer):
    """The rows of metrics.csv that hold readings, as numbers."""
    with Path(trainer.logger.log_dir, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/steps_per_second"]]
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_speed_and_training_time_leave_validation_out(timed_run):
    callback = Throughput()
    trainer, _, _ = timed_run(callback, val_check_interval=4, max_epochs=2)
    assert float(trainer.callback_metrics["train_seconds"]) == pytest.approx(16 * 0.02)
    assert callback.train_seconds == pytest.approx(16 * 0.02)
    values = readings(trainer)[-1]
    assert values["throughput/steps_per_second"] == pytest.approx(50)
    assert values["throughput/samples_per_second"] == pytest.approx(8 * 50)
    assert values["throughput/peak_memory_gib"] == pytest.approx(peak_memory(torch.device("cpu")) / 2**30, rel=0.2)


def test_a_reading_may_span_epochs(timed_run):
    trainer, _, _ = timed_run(Throughput(), max_epochs=3, log_every_n_steps=20)
    assert [row["throughput/steps_per_second"] for row in readings(trainer)] == [pytest.approx(50)]


def test_logged_as_often_as_the_trainer_logs(timed_run):
    trainer, _, _ = timed_run(Throughput())
    assert [row["step"] for row in readings(trainer)] == [3, 7]


def test_a_resumed_run_counts_on(timed_run, fakes, tmp_path):
    trainer, module, data = timed_run(Throughput())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = float(trainer.callback_metrics["train_seconds"])
    callback = Throughput()
    trainer = fakes.quiet_trainer(tmp_path, [callback], max_epochs=2)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert before == pytest.approx(8 * 0.02)
    assert callback.train_seconds == pytest.approx(before + 8 * 0.02)


def test_steps_are_batches_that_stepped_with_accumulation(timed_run):
    trainer, _, _ = timed_run(Throughput(), log_every_n_steps=2, accumulate_grad_batches=2)
    speed = readings(trainer)[-1]
    assert speed["throughput/steps_per_second"] == pytest.approx(25)
    assert speed["throughput/samples_per_second"] == pytest.approx(16 * speed["throughput/steps_per_second"])


def test_between_two_readings_a_step_costs_nothing(monkeypatch):
    class Loop:
        _batches_that_stepped = 0

    class Trainer:
        global_step, log_every_n_steps, world_size = 1, 50, 1
        fit_loop = type("FitLoop", (), {"epoch_loop": Loop})

    def never(*args):
        raise AssertionError("waited for the device")

    monkeypatch.setattr(Throughput, "_stop", never)
    callback, batch = Throughput(), {"index": torch.arange(128)}
    for _ in range(200):
        callback.on_train_batch_end(Trainer, None, None, batch, 0)
        Loop._batches_that_stepped = (Loop._batches_that_stepped + 1) % 48
        Trainer.global_step += 1
    assert callback._samples == 200 * 128
