"""Run by `test_frechet.py`, once for each rank: scores the memorised digits and writes what this rank logged."""

import hashlib
import json
import sys
import tempfile
import warnings
from pathlib import Path

import fakes

from penstock.lightning_modules.callbacks.features import Pixels
from penstock.lightning_modules.callbacks.frechet import FrechetDistance
from penstock.lightning_modules.callbacks.generation import GenerationMetrics
from penstock.lightning_modules.callbacks.label_accuracy import LabelAccuracy
from penstock.lightning_modules.callbacks.samples import SampleGrid

warnings.filterwarnings("ignore")
world, out = int(sys.argv[1]), sys.argv[2]
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
folder = tempfile.mkdtemp()
trainer = fakes.quiet_trainer(
    folder, [metrics, idle, SampleGrid(rows=27, steps=3)], devices=world, strategy="ddp" if world > 1 else "auto"
)
logged = trainer.test(module, datamodule=data, verbose=False)[0]
pictures = list(Path(folder, "samples").glob("*.png"))
result = {
    "world": trainer.world_size,
    "logged": logged,
    "exact": exact,
    "count": frechet._reference.sums.count if frechet._reference else None,
    "picture": hashlib.sha256(pictures[0].read_bytes()).hexdigest() if pictures else None,
}
Path(out).write_text(json.dumps(result))
