"""Fréchet distances of a checkpoint's samples to the test images, on MobileNetV2's features and on pixels.

`python -m penstock.benchmarks.scores CHECKPOINT --real EXPERIMENT --steps 1 4 bellman:4 --to FILE`: the callback that
scores runs, with the data of `EXPERIMENT` for all, so that flows made of pairs are compared with the same real images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from penstock.lightning_modules.build import build, model_from_checkpoint
from penstock.lightning_modules.callbacks.features import FeatureExtractor, Pixels, TimmFeatures
from penstock.lightning_modules.callbacks.frechet import FrechetDistance
from penstock.lightning_modules.callbacks.generation import GenerationMetrics
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.flow_module import FlowModule
from penstock.lightning_modules.loggers import write_atomically


class Scored(LightningModule):
    """A flow that is only sampled from, whatever data its training needs.

    Args:
        flow: With the weights to score.
    """

    def __init__(self, flow: FlowModule):
        super().__init__()
        self.flow, self.num_classes, self.nfe, self.grid_of = flow, flow.num_classes, 0, flow.grid_of

    def sample(self, n: int, **options: Any) -> Tensor:
        """The flow's own samples."""
        made = self.flow.sample(n, **options)
        self.nfe = self.flow.nfe
        return made

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing: the callback works after the last batch."""


def scores(
    checkpoint: Path, words: list[str], features: list[FeatureExtractor], steps: list[str], n: int, accelerator: str
) -> dict[str, float]:
    """`fd_<features>/<calls>` of a checkpoint's averaged weights.

    Args:
        checkpoint: Of a flow.
        words: Of a run whose DataModule holds the real images.
        features: To measure distances on.
        steps: Numbers of steps, or `bellman:K`.
        n: Samples of each set.
        accelerator: `cpu` or `gpu`.
    """
    (data,) = build(compose(words)[0], "data")
    metrics = [FrechetDistance(extractor, split="test") for extractor in features]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_test_batches": 1}
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        use_distributed_sampler=False,
        callbacks=[GenerationMetrics(metrics, [int(s) if s.isdigit() else s for s in steps], n)],
        **quiet,
    )
    (values,) = trainer.test(Scored(model_from_checkpoint(checkpoint)), datamodule=data, verbose=False)
    return values


class InParts(TimmFeatures):
    """The same features; on a CPU of a few images at a time, which takes less than half as long."""

    @torch.no_grad()
    def __call__(self, data: Tensor) -> Tensor:
        """`(b, D)` of images `(b, 1 or 3, H, W)`."""
        parts = [data] if data.is_cuda else data.split(10)
        return torch.cat([super(InParts, self).__call__(part) for part in parts])


def mobilenet(weights: Path) -> TimmFeatures:
    """MobileNetV2's pooled features, from a file of timm's weights."""
    half = (0.5, 0.5, 0.5)
    return InParts("mobilenetv2_100", "mobilenetv2", str(weights.resolve()), pad_type="same", mean=half, std=half)


def main(argv: Sequence[str] | None = None) -> int:
    """Scores one checkpoint and writes the values as JSON."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--real", required=True, help="experiment whose data the samples are compared with")
    options.add_argument("--data", type=Path, help="folder of the data set")
    options.add_argument("--weights", type=Path, help="MobileNetV2's weights (timm, safetensors); pixels only without")
    options.add_argument("--steps", nargs="+", required=True)
    options.add_argument("--n", type=int, default=2000, help="samples of each set")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--to", type=Path, required=True, help="the file to write")
    given = options.parse_args(argv)
    words = [f"experiment={given.real}", *([f"data.data_dir={given.data.resolve()}"] if given.data else [])]
    features = [*([mobilenet(given.weights)] if given.weights else []), Pixels()]
    with torch.no_grad():
        accelerator = "gpu" if given.device == "cuda" else "cpu"
        values = scores(given.checkpoint, words, features, given.steps, given.n, accelerator)
    write_atomically(given.to, json.dumps(values, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
