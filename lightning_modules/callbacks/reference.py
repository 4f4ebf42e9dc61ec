"""Features of the real data: computed once by all ranks, kept on disk under a name that says what they are of."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import safetensors.torch
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from penstock.lightning_modules.callbacks.distances import GaussianSums
from penstock.lightning_modules.callbacks.features import FeatureExtractor, row_numbers
from penstock.lightning_modules.callbacks.ranks import broadcast, gather_rows, rank_and_world
from penstock.lightning_modules.errors import UserError

Split = Literal["train", "val", "test", "all"]
FORMAT = 1
KEPT = 10_000


class Reference(NamedTuple):
    """What is known of a split on one kind of features.

    Attributes:
        sums: over all samples, or parts of them (frames), where the features are of parts.
        features: `(k, D)` float32 of at most 10,000 of these in the data's order, the same for any number of ranks.
        labels: `(k,)` int64 of these, or None without classes.
    """

    sums: GaussianSums
    features: Tensor
    labels: Tensor | None


def cache_folder() -> Path:
    """`$PENSTOCK_CACHE`, or `~/.cache/penstock`."""
    return Path(os.environ.get("PENSTOCK_CACHE") or "~/.cache/penstock").expanduser()


def data_of(batch: dict[str, Tensor]) -> Tensor:
    """The samples of a batch: its `image`, `video` or `points`.

    Raises:
        UserError: if it holds none of these.
    """
    for key in ("image", "video", "points"):
        if key in batch:
            return batch[key]
    raise UserError(f"batch: keys {sorted(batch)} found, expected one of image, video, points")


def real_data(trainer: pl.Trainer) -> str:
    """Fingerprint of the real data.

    Raises:
        UserError: there are none, as for latents without the pictures that they are of.
    """
    datamodule = trainer.datamodule
    return getattr(datamodule, "reference_fingerprint", datamodule.fingerprint)


def reference(trainer: pl.Trainer, extractor: FeatureExtractor, split: Split) -> Reference | None:
    """The reference features of a split, from the cache if it holds them.

    All ranks must call it; each computes the share that `reference_dataloader` gives it.

    Args:
        trainer: runs, with a datamodule that has `reference_dataloader` and `fingerprint`, or
            `reference_fingerprint` where the reference is not of its own samples.
        extractor: prepared on the device of the run.
        split: of the data.

    Returns:
        The reference on rank 0, None on the other ranks.

    Raises:
        UserError: if the split is empty.
    """
    key = {"format": FORMAT, "data": real_data(trainer), "split": split, "features": extractor.identity()}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder() / "reference" / f"{extractor.name}-{split}-{name}.safetensors"
    stored = _read(path) if rank_and_world()[0] == 0 else None
    if broadcast(stored is not None):
        return stored
    rank_zero_info(f"computing the {extractor.name} features of the real data, split '{split}', once: {path}")
    found = _collect(trainer, extractor, split)
    if found is not None:
        _write(path, found)
    return found


def _collect(trainer: pl.Trainer, extractor: FeatureExtractor, split: Split) -> Reference | None:
    sums = GaussianSums()
    rows = _Kept()
    for batch in trainer.datamodule.reference_dataloader(split):
        batch = trainer.strategy.batch_to_device(batch)
        if len(batch["index"]):
            features = extractor(data_of(batch))
            sums.update(features)
            rows.add(*_of_rows(batch, features))
    sums = sums.over_ranks(trainer.strategy.root_device)
    if sums.count < 2:
        raise UserError(f"reference data: split '{split}' holds {sums.count} samples, expected at least 2")
    gathered = gather_rows(*rows.columns())
    if gathered is None:
        return None
    whole = _Kept()
    whole.add(*gathered)
    _, features, labels = whole.columns()
    return Reference(sums, features, labels)


def _of_rows(batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Number, features and class of every row of features."""
    index, label = row_numbers(batch["index"], features), batch.get("label")
    return index, features, None if label is None else label.repeat_interleave(len(index) // len(label))


class _Kept:
    """The rows whose index hashes lowest: a fixed random subset of a stream, whatever its order or split over ranks."""

    def __init__(self) -> None:
        self._rows: tuple[Tensor, Tensor | None, Tensor | None] = (torch.empty(0, dtype=torch.int64), None, None)
        self._pending: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._count = 0

    def add(self, index: Tensor, features: Tensor, labels: Tensor | None) -> None:
        self._pending.append(tuple(None if value is None else value.cpu() for value in (index, features, labels)))
        self._count += len(index)
        if self._count > 2 * KEPT:
            self.columns()

    def columns(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        parts = [part for part in (self._rows, *self._pending) if len(part[0])]
        if parts:
            rows = tuple(None if values[0] is None else torch.cat(values) for values in zip(*parts))
            lowest = np.argsort(_mix(rows[0].numpy()), kind="stable")[:KEPT]
            chosen = torch.from_numpy(lowest)
            chosen = chosen[torch.argsort(rows[0][chosen], stable=True)]
            self._rows = tuple(None if column is None else column[chosen] for column in rows)
        self._pending, self._count = [], len(self._rows[0])
        return self._rows


def _mix(index: np.ndarray) -> np.ndarray:
    """A bijective hash of 64-bit numbers: the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _read(path: Path) -> Reference | None:
    if not path.is_file():
        return None
    try:
        stored = safetensors.torch.load_file(path)
        sums = GaussianSums(int(stored["count"]), stored["total"], stored["outer"])
        return Reference(sums, stored["features"], stored.get("labels"))
    except (safetensors.SafetensorError, KeyError, OSError) as error:
        rank_zero_warn(f"reference statistics {path} cannot be read ({error}); computing them again")
        return None


def _write(path: Path, found: Reference) -> None:
    stored = {
        "count": torch.tensor(found.sums.count),
        "total": found.sums.total,
        "outer": found.sums.outer,
        "features": found.features,
    }
    if found.labels is not None:
        stored["labels"] = found.labels
    _replace(path, lambda name: safetensors.torch.save_file({k: v.contiguous() for k, v in stored.items()}, name))


def _replace(path: Path, save: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        os.close(handle)
        save(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
