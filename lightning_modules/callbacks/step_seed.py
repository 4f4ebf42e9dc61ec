"""Seeds torch's global generators anew at every batch, so that dropout does not depend on what ran before."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.seeds import run_seed


class StepSeed(Callback):
    """Before batch `n` of the run (counted over epochs), seeds the global CPU and CUDA generators from (seed, n, rank).

    A resumed run then drops the same activations as one never stopped. Only torch's global generators are touched:
    data order and `Draws` are keyed by themselves. `torch.manual_seed` is not used: without a GPU it queues a call for
    the day CUDA starts, with a stack trace, at a third of a millisecond each time.

    Args:
        seed: in [0, 2^64); None = the seed of the run.

    Raises:
        UserError: seed outside that range.
    """

    def __init__(self, seed: int | None = None):
        seed = run_seed() if seed is None else seed
        if not 0 <= seed < 2**64:
            raise UserError(f"StepSeed: seed {seed}, expected an integer in [0, 2^64)")
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = step_seed(self.seed, trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)


def step_seed(seed: int, batch: int, rank: int) -> int:
    """A 63-bit hash of three integers, by the steps of SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    state = seed
    for word in (batch, rank):
        state = (state + (word + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1
