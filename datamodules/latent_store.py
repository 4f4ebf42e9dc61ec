"""Rows of a folder of latents."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.latent_shards import read_rows, read_side, read_some
from penstock.lightning_modules.shards import shard_file


class LatentStore:
    """Rows of a folder of latents; codes are read as they are asked for, the rest is in memory.

    Args:
        folder: Of latents, complete.
        manifest: Of the folder.

    Raises:
        UserError: a shard is damaged or has another number of rows.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._made_of, self.folder = (folder, manifest), folder
        self.shapes = manifest["shapes"]
        columns: dict[str, list[Any]] = {key: [] for key in ("index", "split", "label", "bucket", "shard", "row")}
        self.text: list[list[str]] = []
        for number, (bucket, size) in enumerate(manifest["shards"]):
            found = read_rows(shard_file(folder, number), ("index", "split", "label"))
            text = read_side(folder, number)["text"]
            if len(found["index"]) != size or len(text) not in (0, size):
                rows = f"{len(found['index'])} codes and {len(text)} captions"
                raise UserError(f"latents '{shard_file(folder, number)}': {rows}, expected {size}; delete it")
            for key, value in found.items():
                columns[key].append(value.numpy())
            columns["bucket"].append(np.full(size, bucket))
            columns["shard"].append(np.full(size, number))
            columns["row"].append(np.arange(size))
            self.text += text
        joined = {key: np.concatenate(parts) for key, parts in columns.items() if parts}
        order = np.argsort(joined["index"], kind="stable")
        ordered = {key: value[order] for key, value in joined.items()}
        self.index, self.split, self.bucket = (ordered[key] for key in ("index", "split", "bucket"))
        self.shard, self.row, self.label = ordered["shard"], ordered["row"], ordered.get("label")
        if self.text:
            self.text = [self.text[place] for place in order]
        elif self.label is not None:
            self.text = [[str(label)] for label in self.label.tolist()]

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Where the samples `numbers` stand in the columns of this store."""
        return np.searchsorted(self.index, numbers)

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        """Samples `numbers` `(b,)`, of one shape."""
        places = self.places(numbers)
        found: dict[str, Any] = {}
        for shard in np.unique(self.shard[places]):
            own = np.flatnonzero(self.shard[places] == shard)
            codes = read_some(shard_file(self.folder, int(shard)), self.row[places[own]])
            for key, value in codes.items():
                found.setdefault(key, value.new_empty(len(numbers), *value.shape[1:]))[torch.from_numpy(own)] = value
        if self.text:
            found["text"] = [self.text[place] for place in places]
        if self.label is not None:
            found["label"] = torch.from_numpy(self.label[places])
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Goes to a worker process as the name of the folder, not as its content."""
        return LatentStore, self._made_of

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead: the pages come as they are asked for."""


class ByNumber:
    """Captions by number of the sample."""

    def __init__(self, store: LatentStore) -> None:
        self.store = store

    def __getitem__(self, number: int) -> list[str]:
        return self.store.text[self.store.places(np.array([number]))[0]]
