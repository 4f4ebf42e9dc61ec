"""Held-out samples as a density model sees them, and its logarithms in bits per dimension."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.ranks import rank_and_world
from penstock.lightning_modules.callbacks.reference import Split, data_of
from penstock.lightning_modules.errors import UserError


class Held(NamedTuple):
    """Some held-out samples.

    Attributes:
        index: `(b,)` int64, numbers in the data set.
        x: `(b, *shape)`, images or videos dequantised.
        cond: what the module conditions on, or None.
    """

    index: Tensor
    x: Tensor
    cond: Tensor | None


def check_density(trainer: pl.Trainer, pl_module: pl.LightningModule, what: str, method: str = "log_prob") -> None:
    """Refuses, in the name of the callback or metric `what`, a module or data without likelihoods of grey levels.

    Raises:
        UserError: a module without `method`, one whose density is of latents, or data without grey levels.
    """
    name = type(pl_module).__name__
    if not hasattr(pl_module, method):
        raise UserError(f"{what}: {name} has no {method}, expected a density model")
    if getattr(pl_module, "key", "") == "latent":
        raise UserError(f"{what}: the density of {name} is of latents, expected one of images or videos")
    if not getattr(trainer.datamodule, "levels", 0):
        raise UserError(f"{what}: {type(trainer.datamodule).__name__} has no grey levels, expected images or videos")


def dequantised(data: Tensor, index: Tensor, levels: int) -> Tensor:
    """`2 (level + u) / levels - 1` with u ~ U(0, 1) fixed by `index` `(b,)`, of `data` `(b, ...)` in [-1, 1]."""
    level = ((data + 1) / 2 * (levels - 1)).round()
    return 2 * (level + Draws(0, 0, index).uniform("dequantise", tuple(data.shape[1:]))) / levels - 1


def held_out(trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split, n: int) -> Iterator[Held]:
    """This rank's share of the first `n` samples of a split, batch by batch, on the module's device."""
    for batch in first_batches(trainer, trainer.datamodule, split, n):
        yield held(pl_module, batch, trainer.datamodule.levels)


def first_batches(
    trainer: pl.Trainer, data: pl.LightningDataModule, split: Split, n: int
) -> Iterator[dict[str, Tensor | list[str]]]:
    """This rank's share of the first `n` samples of a split of any data, without empty batches, on the device."""
    rest = math.ceil(n / rank_and_world()[1])
    for batch in data.reference_dataloader(split):
        if rest <= 0:
            return
        batch = trainer.strategy.batch_to_device({key: value[:rest] for key, value in batch.items()})
        rest -= len(batch["index"])
        if len(batch["index"]):
            yield batch


def held(pl_module: pl.LightningModule, batch: dict[str, Any], levels: int) -> Held:
    """The samples of a batch that is on the module's device."""
    return Held(batch["index"], dequantised(data_of(batch), batch["index"], levels), pl_module.condition(batch))


def log_prob_of_parts(pl_module: pl.LightningModule, batch: dict[str, Any], levels: int) -> Tensor:
    """Log-densities in nats `(b, T)` of the frames of clips, where the module tells these, else `(b, 1)` of samples."""
    _, x, cond = held(pl_module, batch, levels)
    if x.ndim == 5 and hasattr(pl_module, "frame_log_prob"):
        return evaluated(pl_module.frame_log_prob, x, cond)
    generator = torch.Generator(x.device).manual_seed(0)
    return evaluated(pl_module.log_prob, x, cond, generator=generator)[:, None]


def bits_per_dim(log_prob: Tensor, size: int, levels: int) -> Tensor:
    """Bits a dimension, float64, in units of the grey levels, of log-densities in nats on [-1, 1].

    Args:
        log_prob: of any shape.
        size: dimensions that each is of.
        levels: grey levels of the data; the scale adds `log2(levels / 2)`.
    """
    return -log_prob.double() / (size * math.log(2)) + math.log2(levels / 2)


def evaluated(density: Callable[..., Tensor], x: Tensor, cond: Tensor | None, **options: Any) -> Tensor:
    """`density(x, cond=cond, **options)` without gradients; it may take some inside, even in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return density(x.clone(), cond=None if cond is None else cond.clone(), **options)
