"""Timing that survives a busy machine: the rivals take turns in short blocks, medians are compared."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, all its device work included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def clocks(device: torch.device) -> tuple[float, float]:
    """Wall clock and CPU clock of the process in seconds, once the device has done its work."""
    wait(device)
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """Wall and CPU seconds between two readings of `clocks`."""
    return end[0] - start[0], end[1] - start[1]


def wait(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    rivals: dict[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Runs all rivals once a round, in an order that turns round by round; seconds of each, without `warmup` rounds."""
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    names = list(rivals)
    for turn in range(warmup + rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            spent = seconds(rivals[name], device)
            if turn >= warmup:
                taken[name].append(spent)
    return taken


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs: drift that both rivals meet in one round cancels."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))
