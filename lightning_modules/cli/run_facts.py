"""`facts.json` of a run folder: what neither config.yaml nor metrics.json can say, known only once a run has run."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from penstock.lightning_modules.loggers import write_atomically

FACTS = "facts.json"


def facts(trainer: Trainer, trained: bool) -> dict[str, Any]:
    """What a finished run was.

    Args:
        trainer: Of the run.
        trained: Whether the run was a fit.

    Returns:
        `ranks`; `device`, its name; `accumulation`, batches a step; `batch`, of all ranks, null where
        nothing was trained or the data do not say; `split`, that the last scores are of (validation samples serve as
        test where the data have none of their own), null where nothing was scored.
    """
    data = trainer.datamodule
    return {
        "ranks": trainer.world_size,
        "device": _device(trainer),
        "accumulation": trainer.accumulate_grad_batches if trained else None,
        "batch": getattr(data, "batch_size", None) if trained else None,
        "split": _split(trainer.state.fn, getattr(data, "numbers", None)),
    }


def write_facts(trainer: Trainer, trained: bool) -> None:
    """Writes the file into the run folder; see `facts`."""
    write_atomically(Path(trainer.default_root_dir, FACTS), json.dumps(facts(trainer, trained), indent=1) + "\n")


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _split(verb: TrainerFn | None, numbers: dict[str, Any] | None) -> str | None:
    if verb == TrainerFn.VALIDATING:
        return "val"
    if verb != TrainerFn.TESTING:
        return None
    return "val" if numbers and not len(numbers.get("test", ())) else "test"
