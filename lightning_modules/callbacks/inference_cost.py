"""What a prediction costs: time, operations, parameters and memory."""

import math
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchvision  # noqa: F401 registers torch.ops.torchvision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from penstock.lightning_modules.callbacks.ranks import broadcast
from penstock.lightning_modules.errors import UserError

Work = Callable[[], object]


class InferenceCost(pl.Callback):
    """Measures `predict_step` on the first test images at the end of a test, on rank 0, and logs

    - `latency_ms`: median wall time of the whole prediction (of a detector with what selects its boxes), the device's
      work included, in the precision of the test; a busy machine makes it longer;
    - `gflops`: 1e9 operations of its convolutions, deformable ones too, and matrix products, see `operations`;
    - `parameters_m`: 1e6 parameters, frozen ones too;
    - `memory_mb`: 1e6 bytes of parameters and buffers, and of what the prediction holds at its worst moment beyond
      what was there before, see `peak_bytes`.

    All four are of a batch of `batch_size` images, padded as the data pads them. Sharded models are not measured.

    Args:
        batch_size: Images.
        runs: Timed predictions.
        warmup: Predictions before.

    Raises:
        UserError: fewer than one image or run; a module without `predict_step`, or data that have no images.
    """

    def __init__(self, batch_size: int = 1, runs: int = 20, warmup: int = 3):
        for name, value, least in (("batch_size", batch_size, 1), ("runs", runs, 1), ("warmup", warmup, 0)):
            if value < least:
                raise UserError(f"{name}: {value} given, expected at least {least}")
        self.batch_size, self.runs, self.warmup = batch_size, runs, warmup

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "predict" and not is_overridden("predict_step", pl_module):
            name = type(pl_module).__name__
            raise UserError(f"InferenceCost: {name} has no predict_step, expected a model that predicts from images")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):  # rank 0 cannot predict alone
            return
        values = broadcast(self.measured(trainer, pl_module) if trainer.is_global_zero else None)
        pl_module.log_dict(values, batch_size=1, sync_dist=True)

    def measured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The four values, by their names."""
        view, device = trainer.datamodule.view("test"), pl_module.device
        batch: Any = view.fetch(np.arange(min(self.batch_size, len(view))))
        if "image" not in batch:
            raise UserError(f"InferenceCost: batches hold {', '.join(batch)}, expected image")
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))

        def predict() -> object:
            with trainer.precision_plugin.test_step_context():
                return pl_module.predict_step(batch, 0)

        kept = [*pl_module.parameters(), *pl_module.buffers()]
        seconds = [_seconds(predict, device) for _ in range(self.warmup + self.runs)]
        return {
            "latency_ms": 1e3 * median(seconds[self.warmup :]),
            "gflops": operations(predict) / 1e9,
            "parameters_m": sum(parameter.numel() for parameter in pl_module.parameters()) / 1e6,
            "memory_mb": (peak_bytes(predict, device) + sum(tensor.nbytes for tensor in kept)) / 1e6,
        }


def operations(work: Work) -> int:
    """Multiplications and additions of the convolutions and matrix products in `work` (torch's `FlopCounterMode`).

    Of a deformable convolution those of weights and sampled taps count, as a plain one's, and its offsets'; sampling,
    interpolation, norms and activations do not count. A compiled network is counted as it was written.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable})
    with torch.compiler.set_stance("force_eager"), counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Work, device: torch.device) -> int:
    """Most bytes that `work` holds at a time beyond those held before.

    On CUDA what PyTorch's allocator gave out; on a CPU the same by the profiler's record of allocations, without
    scratch space that libraries such as oneDNN get for themselves.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it writes on stderr that there is no GPU
    with profile(profile_memory=True) as record:
        work()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([0, *(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))])
    return int(held.max())


def _seconds(work: Work, device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _deformable(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Of torchvision's `deform_conv2d`: the plain convolution's."""
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(weight)
