"""What all kinds of data share: splits, loaders, ranks, seeds and the way onto the device."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from penstock.datamodules.pixels import Pixels
from penstock.datamodules.readable import PredictionLoader, Readable, refusal
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader, KeyedSampler, Rows, guarded
from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.ranks import broadcast, gather
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.seeds import run_seed

SPLITS = ("train", "val", "test", "all")
PIXEL_KEYS = ("image", "video")
SOURCE = "source"
Split = Literal["train", "val", "test", "all"]


class Store(Protocol):
    """All samples of a data set under one numbering, whatever split they belong to."""

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]: ...

    def warm(self, numbers: np.ndarray) -> None: ...


class TensorStore:
    """Samples that lie in memory: tensors of equal length, by batch key."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        rows = torch.from_numpy(numbers)
        return {key: value[rows] for key, value in self.tensors.items()}

    @property
    def labels(self) -> Tensor | None:
        """`label` of all samples."""
        return self.tensors.get("label")

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""


class View:
    """The samples of one split: `numbers` `(n,)` of a store. Batches carry them as `index`."""

    def __init__(self, store: Store, numbers: np.ndarray) -> None:
        self.store, self.numbers = store, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def fetch(self, rows: np.ndarray) -> dict[str, Tensor]:
        numbers = self.numbers[rows]
        return {**self.store.fetch(numbers), "index": torch.from_numpy(numbers)}


class KindDataModule(LightningDataModule):
    """One kind of data. A subclass implements `build` (and `prepare_data` where something is downloaded).

    After `setup`: `shape` of one sample, `num_classes` (0 = no labels), `class_names`, `fingerprint`, `levels` (grey
    levels of raw images or videos, 0 for data without levels), `sourced` (whether batches have `source`, clips of the
    same shape and levels that theirs are made of). A data set without a test split uses its held-out split
    as test.

    Args:
        batch_size: global training batch, divided over the ranks.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; 0 reads in the training process.
        seed: key of the order and of augmentations; `None` = the seed of the run.
        pixels: raw levels to float; `None` for data that is float already.

    Raises:
        UserError: a batch size below 1 or a negative seed.
    """

    shape: tuple[int, ...]
    num_classes: int = 0
    class_names: list[str]
    fingerprint: str
    sourced: bool = False

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int | None,
        pixels: Pixels | None = None,
    ) -> None:
        super().__init__()
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"data.{key}: found {value}, expected at least {least}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.pixels = num_workers, seed, pixels
        self.store: Store | None = None
        self.numbers: dict[str, np.ndarray] = {}
        self.predicted: PredictionLoader | None = None

    def build(self) -> tuple[Store, dict[str, np.ndarray]]:
        """Opens the data, sets the attributes of the contract, returns the store and the numbers of train/val/test."""
        raise NotImplementedError

    @property
    def levels(self) -> int:
        return self.pixels.levels if self.pixels else 0

    @property
    def augments(self) -> bool:
        """Whether training images or videos are flipped, turned or dequantised."""
        return self.pixels is not None and self.pixels.augments

    @property
    def run_seed(self) -> int:
        """`seed`, or the seed that `seed_everything` left in the environment, or 0."""
        return self.seed if self.seed is not None else run_seed()

    @property
    def ranks(self) -> tuple[int, int]:
        """(rank, world) among the processes that share a batch."""
        shared = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (shared["rank"], shared["num_replicas"]) if shared else (0, 1)

    def setup(self, stage: str | None = None) -> None:
        _, world = self.ranks
        if self.batch_size % world:
            below = self.batch_size // world * world
            near = " or ".join(str(n) for n in (below, below + world) if n)
            raise UserError(
                f"data.batch_size: found {self.batch_size}, which {world} ranks cannot share evenly; nearest: {near}",
                everywhere=True,
            )
        if self.eval_batch_size < world:
            raise UserError(
                f"data.eval_batch_size: found {self.eval_batch_size}, expected at least one sample for each of the "
                f"{world} ranks",
                everywhere=True,
            )
        if self.store is None:
            self.store, self.numbers = self.build()

    def view(self, split: Split) -> View:
        """The samples of one split, each under its number in the whole data set.

        Raises:
            UserError: unknown split, or a split without samples.
        """
        if split not in SPLITS:
            raise UserError(f"split: found '{split}', expected one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
        if split == "all":
            numbers = np.unique(np.concatenate(list(self.numbers.values())))
        else:
            numbers = self.numbers[split]
            if split == "test" and not len(numbers):
                numbers = self.numbers["val"]
        if not len(numbers):
            raise UserError(f"{type(self).__name__}: the '{split}' split is empty; set data.val_fraction above 0")
        self.store.warm(numbers)
        return View(self.store, numbers)

    def train_dataloader(self) -> KeyedLoader:
        return self.loader(self.view("train"), self.train_batches(len(self.numbers["train"])))

    def val_dataloader(self) -> KeyedLoader | list:
        return self._eval_loader("val") if len(self.numbers["val"]) else []

    def test_dataloader(self) -> KeyedLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> PredictionLoader:
        """The test split; samples that cannot be read are left out, and `teardown` names them."""
        view = self.view("test")
        self.predicted = PredictionLoader(self.loader(Readable(view), self.eval_batches(len(view))))
        return self.predicted

    def teardown(self, stage: str) -> None:
        """After a prediction, names what could not be read.

        Raises:
            UserError: some of it could not.
        """
        if stage != "predict" or self.predicted is None:
            return
        parts = gather(self.predicted.unreadable)
        lines = broadcast(None if parts is None else {row: line for part in parts for row, line in part.items()})
        if lines:
            raise refusal(lines)

    def reference_dataloader(self, split: Split = "train", everywhere: bool = False) -> KeyedLoader:
        """Every sample of `split` once over all ranks, in order, as final float data: no augmentation ever.

        With `everywhere` each rank has all of them, in batches as large as its shares of the others.
        """
        view, (_, world) = self.view(split), self.ranks
        finish = partial(_scaled, pixels=self.pixels, sourced=self.sourced)
        whole = KeyedBatchSampler(KeyedSampler(len(view)), self.eval_batch_size // world)
        return self.loader(view, whole if everywhere else self.eval_batches(len(view)), finish)

    def sources(self, rows: Tensor, split: Split = "test") -> Tensor:
        """Of data with sources, those `(b, *shape)` of samples `rows` `(b,)` of a split, over and over.

        They are as evaluation sees them. The store has `sources(numbers)`.
        """
        numbers = self.view(split).numbers
        return self.pixels.scale(self.store.sources(numbers[rows.cpu().numpy() % len(numbers)]))

    def finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as evaluation sees it: `image` or `video` scaled to [-1, 1]. A scaled batch is left alone."""
        return _scaled(batch, self.pixels, self.sourced)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> dict[str, Any]:
        """Moves the tensors of a flat batch, without the walk through containers that Lightning makes each time."""
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Scales raw images and videos; in training also flips and dequantises, keyed by (seed, epoch, index)."""
        key = _raw_key(batch)
        if self.trainer is None or not self.trainer.training or key is None:
            return self.finished(batch)
        draws = self.draws(batch["index"])
        sources = {SOURCE: self.pixels.augment(batch[SOURCE], draws, "source_")} if self.sourced else {}
        return {**batch, key: self.pixels.augment(batch[key], draws), **sources}

    def draws(self, index: Tensor) -> Draws:
        """Random numbers of this epoch for samples `index` `(B,)`."""
        return Draws(self.run_seed, self.trainer.current_epoch, index)

    def train_batches(self, size: int) -> KeyedBatchSampler:
        """Shuffled batches of `size` samples; in file order when Lightning overfits a few batches."""
        if size < self.batch_size:
            raise UserError(
                f"data.batch_size: found {self.batch_size}, but the training split holds {size} samples; "
                f"expected at most {size}"
            )
        rank, world = self.ranks
        shuffle = not (self.trainer and self.trainer.overfit_batches)
        clock = (lambda: self.trainer.current_epoch) if self.trainer else None
        sampler = KeyedSampler(size, seed=self.run_seed, shuffle=shuffle, clock=clock)
        return KeyedBatchSampler(sampler, self.batch_size, rank=rank, world=world, drop_last=True)

    def eval_batches(self, size: int) -> KeyedBatchSampler:
        """Ordered batches of `size` samples, each sample once over all ranks."""
        rank, world = self.ranks
        if size < world:
            raise UserError(f"{type(self).__name__}: a split of {size} samples cannot be shared by {world} ranks")
        return KeyedBatchSampler(KeyedSampler(size), self.eval_batch_size, rank=rank, world=world)

    def loader(self, rows: Rows, batches: KeyedBatchSampler, collate=None) -> KeyedLoader:
        """A loader of whole batches; `collate` is applied to each where it is read."""
        return KeyedLoader(
            guarded(rows),
            batch_sampler=batches,
            collate_fn=partial(_collated, collate=collate),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.run_seed),
        )

    def _eval_loader(self, split: Split) -> KeyedLoader:
        view = self.view(split)
        return self.loader(view, self.eval_batches(len(view)))


def held_out(size: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held): a fixed random split of 0 .. size-1 into ascending numbers, the same for every seed of a run.

    Raises:
        UserError: `fraction` outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.val_fraction: found {fraction}, expected a number in [0, 1)")
    shuffled = np.random.default_rng(0).permutation(size)
    count = max(round(size * fraction), 1) if fraction else 0
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def halves(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(one, other): a fixed random half of the samples of every kind, the same for every seed of a run.

    Args:
        kinds: `(n,)`, what each sample is.

    Returns:
        Ascending numbers of 0 .. n-1; a kind of an odd number of samples has one more in the other half.
    """
    shuffled = np.random.default_rng(0).permutation(len(kinds))
    one = np.zeros(len(kinds), dtype=bool)
    for kind in np.unique(kinds):
        members = shuffled[kinds[shuffled] == kind]
        one[members[: len(members) // 2]] = True
    return np.flatnonzero(one), np.flatnonzero(~one)


def fingerprint(*parts: object) -> str:
    """First 16 hex digits of the SHA-256 of `parts`; arrays and bytes count by content, the rest by `repr`."""
    digest = hashlib.sha256()
    for part in parts:
        content = np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else part
        content = content if isinstance(content, bytes) else repr(content).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def find_folder(name: str, data_dir: str | Path | None) -> Path | None:
    """`data_dir`, or the folder `$PENSTOCK_DATA/<name>` where there is one.

    Raises:
        UserError: `data_dir` is given and is not a folder.
    """
    if data_dir is not None:
        if not (folder := Path(data_dir).expanduser()).is_dir():
            raise UserError(f"data.data_dir: no folder at {folder.absolute()}; expected the data of '{name}' there")
        return folder
    root = os.environ.get("PENSTOCK_DATA")
    folder = Path(root).expanduser() / name if root else None
    return folder if folder and folder.is_dir() else None


def _scaled(batch: dict[str, Any], pixels: Pixels | None, sourced: bool) -> dict[str, Any]:
    key = _raw_key(batch)
    keys = () if key is None else (key, SOURCE) if sourced else (key,)
    return {**batch, **{key: pixels.scale(batch[key]) for key in keys}}


def _raw_key(batch: dict[str, Any]) -> str | None:
    """The entry that holds grey levels; None where there is none, or it is float already."""
    return next((key for key in PIXEL_KEYS if key in batch and not batch[key].is_floating_point()), None)


def _collated(batch: dict[str, Any] | UserError, collate: Callable | None) -> Any:
    """What is read, through `collate`; an error goes through to the loader, which raises it."""
    return batch if collate is None or isinstance(batch, UserError) else collate(batch)
