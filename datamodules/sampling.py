"""Which sample comes when: orders keyed by (seed, epoch), shares of ranks, and a loader that can be resumed."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from penstock.lightning_modules.errors import UserError


class Rows(Protocol):
    """What a loader reads from: a length and whole batches by row number."""

    def __len__(self) -> int: ...

    def fetch(self, rows: np.ndarray) -> dict[str, Any]: ...


class KeyedSampler(Sampler[int]):
    """Order of `size` samples: a permutation that depends on (seed, epoch) alone, or 0 .. size-1.

    Args:
        size: number of samples.
        seed: key of the order.
        shuffle: permute, or keep the order of the data.
        clock: tells the epoch; `None` = the one given to `set_epoch`. Under a trainer its `current_epoch`, because
            Lightning calls `set_epoch` with one more than that when a run of `max_steps` resumes at an epoch's end.
    """

    def __init__(
        self, size: int, *, seed: int = 0, shuffle: bool = False, clock: Callable[[], int] | None = None
    ) -> None:
        self.size, self.seed, self.shuffle, self.clock = size, seed, shuffle, clock
        self._epoch = 0

    @property
    def epoch(self) -> int:
        return self.clock() if self.clock else self._epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def order(self) -> np.ndarray:
        """Row numbers of this epoch, int64 `(size,)`."""
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return self.size


class KeyedBatchSampler(Sampler[np.ndarray]):
    """One rank's contiguous share of every global batch.

    Global batch k is `order[k B : (k + 1) B]` whatever the number of ranks. In training (`drop_last`) the incomplete
    batch at the end is dropped. In evaluation every sample comes exactly once; a remainder with fewer samples than
    ranks joins the batch before it, so that all ranks have the same number of batches and none is empty.

    Args:
        sampler: order of the epoch.
        batch_size: global batch B, at least `world`.
        rank: this process, 0 .. world-1.
        world: number of processes that share the batch.
        drop_last: training rule (drop) or evaluation rule (join).

    `start` is the first batch of the next iteration; `KeyedLoader` sets it.

    Raises:
        ValueError: fewer samples, or a smaller batch, than ranks.
    """

    def __init__(
        self, sampler: KeyedSampler, batch_size: int, *, rank: int = 0, world: int = 1, drop_last: bool = False
    ) -> None:
        size = len(sampler)
        if min(batch_size, size) < world:
            raise ValueError(f"{size} samples in batches of {batch_size} cannot be shared by {world} ranks")
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self.rank, self.world = rank, world
        self.start = 0
        self._edges = self.edges(size)

    def edges(self, size: int) -> list[int]:
        """Where the global batches of `size` samples begin and end, from 0."""
        whole, rest = divmod(size, self.batch_size)
        edges = [k * self.batch_size for k in range(whole + 1)]
        if rest and not self.drop_last:
            if rest < self.world and whole:
                edges.pop()
            edges.append(size)
        return edges

    def share(self, batch: np.ndarray) -> np.ndarray:
        """This rank's contiguous part of one global batch."""
        return batch[len(batch) * self.rank // self.world : len(batch) * (self.rank + 1) // self.world]

    def __iter__(self) -> Iterator[np.ndarray]:
        order, edges = self.sampler.order(), self._edges[self.start :]
        return (self.share(order[a:b]) for a, b in pairwise(edges))

    def __len__(self) -> int:
        return len(self._edges) - 1


class PartneredBatchSampler(KeyedBatchSampler):
    """Adds to every row an independent uniform row of another set, keyed by (seed, epoch, row).

    Yields int64 `(2, b)`: rows of the own set, rows of the other set (which has `others` samples).
    """

    def __init__(self, sampler: KeyedSampler, batch_size: int, *, others: int, rank: int, world: int, drop_last: bool):
        super().__init__(sampler, batch_size, rank=rank, world=world, drop_last=drop_last)
        self.others = others

    def __iter__(self) -> Iterator[np.ndarray]:
        key = (self.sampler.seed, self.sampler.epoch, 1)
        partner = np.random.default_rng(key).integers(self.others, size=len(self.sampler))
        return (np.stack((rows, partner[rows])) for rows in super().__iter__())


class BucketedBatchSampler(KeyedBatchSampler):
    """Every global batch holds rows of one bucket, for samples whose shapes differ between buckets.

    The rows of a bucket keep the order of the epoch and are cut as `KeyedBatchSampler` cuts all of them; which bucket
    comes when is a permutation that depends on (seed, epoch) alone, or the order of the buckets.

    Args:
        sampler: order of the epoch.
        batch_size: global batch, at least `world`.
        buckets: `(n,)` number of each row's bucket.
        rank: this process.
        world: number of processes that share the batch.
        drop_last: training rule (drop a bucket's incomplete batch) or evaluation rule (join).

    Raises:
        ValueError: as `KeyedBatchSampler`; in evaluation also a bucket with fewer rows than ranks.
    """

    def __init__(
        self, sampler: KeyedSampler, batch_size: int, *, buckets: np.ndarray, rank: int, world: int, drop_last: bool
    ):
        super().__init__(sampler, batch_size, rank=rank, world=world, drop_last=drop_last)
        self.buckets = buckets
        self._cuts = {int(b): self.edges(int(n)) for b, n in zip(*np.unique(buckets, return_counts=True))}
        if not drop_last and (few := [n for cut in self._cuts.values() if (n := cut[-1]) < world]):
            raise ValueError(f"a bucket of {few[0]} samples cannot be shared by {world} ranks")

    def __iter__(self) -> Iterator[np.ndarray]:
        order = self.sampler.order()
        own = self.buckets[order]
        batches = [order[own == b][first:last] for b, cut in self._cuts.items() for first, last in pairwise(cut)]
        turns = np.arange(len(batches))
        if self.sampler.shuffle:
            turns = np.random.default_rng((self.sampler.seed, self.sampler.epoch, 2)).permutation(turns)
        return (self.share(batches[k]) for k in turns[self.start :])

    def __len__(self) -> int:
        return sum(len(cut) - 1 for cut in self._cuts.values())


class _Guarded(Dataset):
    """Hands a `UserError` over as a value, for a worker process would bury its line in a traceback.

    The loader raises a new one: raising the value itself would tie loader and traceback in a cycle, and collecting that
    closes the workers' queues before the workers are told to stop (10 s of waiting).
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {k: v[0] for k, v in self.rows.fetch(np.array([row])).items()}

    def __getitems__(self, rows: np.ndarray) -> dict[str, Any] | UserError:
        try:
            return self.rows.fetch(np.asarray(rows))
        except UserError as error:
            return error


def guarded(rows: Rows) -> Dataset:
    """`rows` as a data set for `KeyedLoader`."""
    return _Guarded(rows)


class KeyedLoader(DataLoader):
    """DataLoader over a `KeyedBatchSampler` that counts its batches, so that a run resumes in the middle of an epoch.

    Lightning stores `state_dict()` with the training loop. It makes the iterator before it sets the epoch, so the
    epoch is read at the first batch. A state of another epoch starts that epoch from its beginning.
    """

    _batches = 0
    _epoch = 0
    _resume: dict[str, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """Plain numbers: epoch, batches handed out in it, and batches of a whole epoch."""
        return {"epoch": self._epoch, "batches": self._batches, "length": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the batches that `state` counts, in its epoch unless another is set before iteration."""
        self._resume = dict(state)
        self._epoch, self._batches = state["epoch"], state["batches"]
        self.batch_sampler.sampler.set_epoch(state["epoch"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._run()

    def _run(self) -> Iterator[dict[str, Any]]:
        state, self._resume = self._resume, None
        self._epoch, self._batches = self.batch_sampler.sampler.epoch, 0
        if state and state["epoch"] == self._epoch:
            if state["length"] != len(self):
                raise UserError(
                    f"the checkpoint stopped after {state['batches']} of {state['length']} batches of epoch "
                    f"{self._epoch}, but this run has {len(self)} an epoch: resume with the data and data.batch_size "
                    "of that run"
                )
            self._batches = state["batches"]
        self.batch_sampler.start = self._batches
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise UserError(str(batch))
            self._batches += 1
            yield batch
