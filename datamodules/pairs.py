"""Pairs of noise and the samples that a trained flow makes of it, for reflow, distillation and straightening."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from penstock.datamodules.base import KindDataModule, Split, TensorStore, fingerprint, held_out
from penstock.datamodules.sampling import KeyedLoader
from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.ranks import rank_and_world
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.flow.solvers import Solver
from penstock.lightning_modules.pairs import (
    PairMaker,
    Recipe,
    default_folder,
    read_manifest,
    shard_layout,
    write_pairs,
)
from penstock.lightning_modules.shards import shard_file

MADE = 6000  # pairs where nobody says how many


class Pairs(KindDataModule):
    """Batches `source` (noise), the data that the teacher made of it, `label` where it is conditional, and `index`.

    With `keep` the batches hold `states` `(B, len(times), ...)` of the teacher's trajectory too, and the DataModule has
    `times`. What metrics compare samples with (`reference_dataloader`), classes and shape are those of `real`.

    On disk (the format is in `lightning_modules/pairs.py`) what is missing is made in `setup` by all ranks together, so
    a killed run goes on where it was. `online` makes the pairs of every training batch anew, from noise keyed by
    (seed, epoch, index), and stores nothing.

    Args:
        real: The data set that the teacher was trained on.
        teacher: Checkpoint of a flow, whose averaged weights make the pairs. None: only read `folder`.
        n: Number of pairs; of an epoch where `online`. None is 6000 of a teacher, and all that a `folder` read without
            one has.
        steps: Steps of the solver.
        solver: Solver that makes the pairs; None is the teacher's own.
        guidance: Guidance scale of the teacher.
        keep: Which states of the trajectory to keep: indices 0 .. `steps`, `bellman:K` (the K steps that cost the
            teacher least), `uniform:K`, or None for both ends.
        pairs_seed: Of the noise of pairs on disk, independent of the run's seed.
        pairs_batch: Pairs that the teacher makes at once.
        shard: Pairs of one file, a multiple of `pairs_batch`.
        folder: Where the pairs lie; None is a folder beside the teacher, named after what the pairs depend on.
        online: Make pairs on the fly.
        batch_size: Global training batch.
        eval_batch_size: Global batch of evaluation; None is `batch_size`.
        num_workers: Worker processes a rank.
        seed: Key of the order; None is the seed of the run.
        val_fraction: Part of the pairs that is held out, in [0, 1).

    Raises:
        UserError: neither teacher nor folder, or an argument out of range.
    """

    def __init__(
        self,
        real: KindDataModule,
        teacher: str | None = None,
        n: int | None = None,
        steps: int = 20,
        solver: Solver | None = None,
        guidance: float = 1.0,
        keep: list[int] | str | None = None,
        pairs_seed: int = 0,
        pairs_batch: int = 250,
        shard: int = 1000,
        folder: str | None = None,
        online: bool = False,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        val_fraction: float = 0.02,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=real.pixels,
        )
        if teacher is None and (folder is None or online):
            raise UserError("data.teacher: found none; expected a checkpoint of a trained flow (teacher=...)")
        self.real, self.teacher, self.online = real, teacher, online
        self.folder = Path(folder) if folder else None
        self.keep, self.val_fraction = keep, val_fraction
        kept = tuple(keep) if isinstance(keep, list) else None
        self.n = n
        number = MADE if n is None else n
        self.recipe = Recipe(number, steps, solver, guidance, pairs_seed, pairs_batch, shard, kept)
        self.times: list[float] | None = None
        self._maker: PairMaker | None = None

    def prepare_data(self) -> None:
        self.real.prepare_data()

    def build(self) -> tuple[Any, dict[str, np.ndarray]]:
        real = self.real
        real.trainer = self.trainer
        if real.store is None:
            real.store, real.numbers = real.build()
        self.shape, self.num_classes, self.class_names = real.shape, real.num_classes, real.class_names
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if self.teacher is not None:
            if isinstance(self.keep, str):
                self.recipe = replace(self.recipe, keep=self._schedule(self.keep, device))
            self._maker = self.pair_maker(self.teacher, device)
        store, identity = (TensorStore(), self._maker.identity()) if self.online else self._written()
        self.times = self.recipe.times
        self.fingerprint = fingerprint("pairs", real.fingerprint, json.dumps(identity, sort_keys=True), self.recipe.n)
        kept, held = held_out(self.recipe.n, self.val_fraction)
        return store, {"train": kept, "val": held, "test": held[:0]}

    def pair_maker(self, teacher: str, device: torch.device) -> PairMaker:
        """The teacher, ready to make pairs.

        Raises:
            UserError: its samples have another shape than those of `real`.
        """
        maker = PairMaker(teacher, self.recipe, device)
        if maker.shape != self.shape:
            raise UserError(f"data.teacher: makes samples {maker.shape}, expected {self.shape}, data.real's")
        return maker

    def _schedule(self, name: str, device: torch.device) -> tuple[int, ...]:
        """Indices of a schedule: rank 0 searches, the others read what it stored."""
        from penstock.lightning_modules.bellman import schedule

        kind, _, k = name.partition(":")
        if kind not in ("bellman", "uniform") or not k.isdigit():
            near = did_you_mean(kind, ["bellman", "uniform"])
            raise UserError(f"data.keep: found '{name}'{near}; expected bellman:K, uniform:K or a list of indices")
        found = []
        for first in (True, False):
            if first == (rank_and_world()[0] == 0):
                options = {"k_max": self.recipe.steps, "guidance": self.recipe.guidance, "device": device}
                found = schedule(self.teacher, int(k), uniform=kind == "uniform", **options)
            _barrier()
        return tuple(found)

    def _written(self) -> tuple["PairStore", dict[str, Any]]:
        """Makes what is missing on disk and opens it; returns the store and the manifest."""
        if self._maker is None:
            folder = self.folder
        else:
            folder = self.folder or default_folder(self._maker)
            rank, world = rank_and_world()
            with tqdm(total=self.recipe.n, desc="pairs", unit="pair", disable=rank > 0, mininterval=1) as bar:
                write_pairs(self._maker, folder, rank=rank, world=world, barrier=_barrier, tick=bar.update)
            self._maker = None
        manifest = read_manifest(folder)
        if manifest["key"] != "latent" and tuple(manifest["shape"]) != self.shape:
            raise UserError(f"pairs '{folder}': samples {manifest['shape']}, expected {list(self.shape)}, data.real's")
        kept = manifest["keep"] and tuple(manifest["keep"])
        n = manifest["n"] if self.teacher is None and self.n is None else self.recipe.n
        if n > manifest["n"]:
            raise UserError(
                f"pairs '{folder}': {manifest['n']} pairs, expected data.n={n}; give data.n={manifest['n']}, or "
                f"data.n=null for all that are there"
            )
        self.recipe = Recipe(n, manifest["steps"], keep=kept)
        return PairStore(folder, manifest, self.recipe.n), manifest

    @property
    def reference_fingerprint(self) -> str:
        """Of the samples that `reference_dataloader` gives: the same for all pairs of one data set."""
        return self.real.fingerprint

    def reference_dataloader(self, split: Split = "train") -> KeyedLoader:
        """Real samples, never the teacher's."""
        self.real.trainer, self.real.eval_batch_size = self.trainer, self.eval_batch_size
        return self.real.reference_dataloader(split)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Online, the teacher makes the batch here, on the device."""
        if not self.online or "source" in batch:
            return batch
        index = batch["index"]
        draws = self.draws(index) if self.trainer.training else Draws(self.recipe.seed, 0, index)
        return {**batch, **ends(self._maker.make(index, draws), self._maker.key)}


def _barrier() -> None:
    if rank_and_world()[1] > 1:
        dist.barrier()


def ends(made: dict[str, Any], key: str) -> dict[str, Any]:
    """Adds `source` and the data to a batch that has the whole trajectory."""
    if "states" not in made:
        return made
    return {"source": made["states"][:, 0], key: made["states"][:, -1], **made}


class PairStore:
    """Rows of a folder of pairs, read through memory maps.

    Args:
        folder: Of pairs.
        manifest: Of the folder.
        n: How many of the pairs are used.

    Raises:
        UserError: a shard is missing or cut short.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], n: int) -> None:
        self._made_of = folder, manifest, n
        self.shard, self.key = manifest["shard"], manifest["key"]
        self.maps: list[dict[str, np.ndarray]] = []
        for number, first in enumerate(range(0, n, self.shard)):
            path, rows = shard_file(folder, number), min(self.shard, n - first)
            if not path.exists():
                raise UserError(f"pairs '{folder}': {path.name} is missing; finish them with penstock pairs")
            layout = shard_layout(path)
            if layout["rows"] < rows:
                raise UserError(f"pairs '{path}': {layout['rows']} pairs, expected {rows}; finish with penstock pairs")
            self.maps.append(
                {
                    name: np.memmap(path, mode="r", dtype=dtype, shape=shape, offset=offset)
                    for name, (dtype, shape, offset) in layout["tensors"].items()
                }
            )

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """Pairs `numbers` `(b,)`."""
        shards, rows = np.divmod(numbers, self.shard)
        out = {k: np.empty((len(numbers), *v.shape[1:]), dtype=v.dtype) for k, v in self.maps[0].items()}
        for shard in np.unique(shards):
            place = np.flatnonzero(shards == shard)
            for name, values in self.maps[shard].items():
                out[name][place] = values[rows[place]]
        return ends({name: torch.from_numpy(value) for name, value in out.items()}, self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        """Goes to a worker process as the name of the folder, not as its content."""
        return PairStore, self._made_of

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead: the pages come as they are asked for."""
