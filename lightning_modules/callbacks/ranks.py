"""The few collective operations that metrics need; with one process each is the identity."""

from typing import Any

import torch
import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) when `torch.distributed` is not in use."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any] | None:
    """The values of all ranks, in rank order, on rank 0; None on the others. All ranks must call it."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values = [None] * world if rank == 0 else None
    dist.gather_object(value, values)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank. All ranks must call it."""
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def largest(value: int) -> int:
    """The largest of the ranks' values, on every rank. All ranks must call it."""
    return broadcast(max(values) if (values := gather(value)) else 0)


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over the ranks of a tensor of equal shape on each, in the tensor's precision."""
    if rank_and_world()[1] > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def shared_count(count: torch.Tensor, least: float = 1) -> torch.Tensor:
    """What each rank divides its sum by, for the mean of the ranks' quotients to be the mean over all that they have.

    Args:
        count: What this rank has, any shape; on one rank it is the answer.
        least: Of the counts of all ranks together.
    """
    return sum_over_ranks(count).clamp(min=least) / rank_and_world()[1]


def all_rows(value: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The rows `(k, ...)` of all ranks in rank order, and which of them are this rank's. All ranks must call it.

    `k` may differ between ranks. The rows travel by way of the CPU.
    """
    rank, world = rank_and_world()
    if world == 1:
        return value, slice(None)
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, value.cpu())
    first = sum(len(part) for part in parts[:rank])
    return torch.cat(parts).to(value.device), slice(first, first + len(value))


def gather_rows(index: torch.Tensor, *columns: torch.Tensor | None) -> tuple[torch.Tensor | None, ...] | None:
    """Rows held by all ranks, put in order.

    Args:
        index: `(k,)` int64, the place of each row in the whole set. `k` may differ between ranks and be 0.
        *columns: `(k, ...)` tensors that belong to these rows; None on every rank for a column that is absent. A rank
            without rows may pass None for any of them.

    Returns:
        `(index, *columns)` sorted by index, on the CPU, on rank 0; None on the other ranks.
    """
    held = (index, *columns)
    parts = gather(tuple(None if value is None else value.cpu() for value in held))
    if parts is None:
        return None
    parts = [part for part in parts if len(part[0])]
    if not parts:
        return held
    columns = [None if values[0] is None else torch.cat(values) for values in zip(*parts)]
    order = torch.argsort(columns[0], stable=True)
    return tuple(None if column is None else column[order] for column in columns)
