"""Scores the memorised digits; run by `test_frechet.py` as one process for each of two ranks, and called for one."""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import fakes

from penstock.lightning_modules.callbacks.features import Pixels
from penstock.lightning_modules.callbacks.frechet import FrechetDistance
from penstock.lightning_modules.callbacks.generation import GenerationMetrics
from penstock.lightning_modules.callbacks.label_accuracy import LabelAccuracy
from penstock.lightning_modules.callbacks.samples import SampleGrid


def run(world: int, folder: Path) -> dict:
    """What this rank logged, the values before they were rounded for logging, and the picture's hash."""
    exact = {}

    def remember(metric):
        compute = metric.compute

        def wrapped(trainer):
            values = compute(trainer)
            exact.update(values)
            return values

        metric.compute = wrapped
        return metric

    module, data = fakes.digits_module_and_data()
    frechet = FrechetDistance(Pixels(), also=["kid", "precision", "recall"], split="all")
    metrics = GenerationMetrics([remember(frechet), remember(LabelAccuracy())], steps=[3], n=620)
    idle = GenerationMetrics([FrechetDistance(Pixels(), also=["kid"]), LabelAccuracy()], steps=[2], n=100)
    callbacks = [metrics, idle, SampleGrid(rows=27, steps=3)]
    trainer = fakes.quiet_trainer(folder, callbacks, devices=world, strategy="ddp" if world > 1 else "auto")
    logged = trainer.test(module, datamodule=data, verbose=False)[0]
    pictures = list(Path(folder, "samples").glob("*.png"))
    return {
        "world": trainer.world_size,
        "logged": logged,
        "exact": exact,
        "count": frechet._reference.sums.count if frechet._reference else None,
        "picture": hashlib.sha256(pictures[0].read_bytes()).hexdigest() if pictures else None,
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    out = Path(sys.argv[1], f"rank{os.environ['RANK']}")
    out.with_suffix(".json").write_text(json.dumps(run(2, out)))
