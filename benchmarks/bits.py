"""What two runs must have in common to the last bit, wherever they ran and however often they were stopped."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from penstock.lightning_modules.checkpoints import load_checkpoint

OF_PLACE_AND_TIME = ("Checkpoint", "Throughput")
CLOCKS = ("throughput/", "train_seconds")


def state(run: Path) -> dict[str, Any]:
    """All that a run's last checkpoint holds and that must not depend on where it was stopped, flat.

    Raises:
        AssertionError: the run averages its weights and the checkpoint has no average, or the other way round.
    """
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    callbacks = {k: v for k, v in checkpoint["callbacks"].items() if not k.startswith(OF_PLACE_AND_TIME)}
    averaged = any(key.startswith("EMA") for key in callbacks)
    assert averaged == ("callbacks.ema.EMA" in checkpoint["config"]), "an average that was asked for, or none"
    kept = ["global_step", "state_dict", "optimizer_states", "lr_schedulers"] + ["current_model_state"] * averaged
    return dict(_flat({"callbacks": callbacks} | {key: checkpoint[key] for key in kept}, ""))


def differing(run: Path, other: Path) -> list[str]:
    """Names of what differs between the last checkpoints of two runs; NaN is itself."""
    found, expected = state(run), state(other)
    names = sorted(found.keys() ^ expected.keys())
    return names + [key for key in sorted(found.keys() & expected.keys()) if not _same(found[key], expected[key])]


def metrics(run: Path) -> dict[int, dict[str, str]]:
    """`metrics.csv` by step, as text (all digits), without what depends on the clock."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    return {
        step: {k: v for k, v in row.items() if v and not k.startswith(CLOCKS)} for step, row in sorted(rows.items())
    }


def _flat(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _flat(value, f"{name}/{key}")
    else:
        yield name, node


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and one == other
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (one, other)))
