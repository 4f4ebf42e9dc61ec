"""Writes a data set's pictures as latents (the folder's form is in `latent_shards`)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from penstock.datamodules.base import KindDataModule
from penstock.datamodules.mixed import Mixed
from penstock.datamodules.sampling import guarded
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.latent_shards import (
    MANIFEST,
    SPLITS,
    VERSION,
    channel_sums,
    missing,
    read_manifest,
    written,
)
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.shards import shard_file


class Encoder:
    """A data set and the autoencoder that its pictures go through.

    Rows keep their numbers and splits in the data set, and all wordings of their captions; none is augmented.

    Args:
        data: Images or videos, ready or not.
        autoencoder: To the flow's space.
        batch: Pictures that are encoded at once.
        shard: Rows of one file, a multiple of `batch`.
        dtype: Of the stored codes.
        device: Where pictures are encoded.

    Raises:
        UserError: `shard` is no multiple of `batch`, the data hold no pictures, or sources, the autoencoder refuses
            their shape, or it has statistics of latents.
    """

    def __init__(
        self,
        data: KindDataModule,
        autoencoder: Autoencoder,
        batch: int = 8,
        shard: int = 256,
        dtype: Literal["float16", "float32"] = "float16",
        device: torch.device | str = "cpu",
    ):
        for key, value in {"batch": batch, "shard": shard}.items():
            if value < 1:
                raise UserError(f"encode: {key}={value}, expected 1 or more")
        if shard % batch:
            raise UserError(f"encode: shard={shard}, expected a multiple of batch={batch}")
        if not isinstance(data, KindDataModule) or hasattr(data, "real"):
            raise UserError(f"encode: data is a {type(data).__name__}, expected images or videos as they are")
        if getattr(autoencoder, "standard", None) is not None:
            raise UserError(
                "encode: model.autoencoder.statistics is given, which are made of the latents; leave it out"
            )
        if data.store is None:
            data.prepare_data()
            data.setup()
        if isinstance(data, Mixed):
            raise UserError("encode: data is a Mixed, expected videos or images; encode each by itself")
        if data.sourced:
            raise UserError("encode: the data have sources, which folders of latents do not hold; expected plain ones")
        self.data, self.autoencoder, self.batch, self.dtype, self.device = data, autoencoder, batch, dtype, device
        view = data.view("all")
        self.rows, self.numbers = data.reference_dataloader("all").dataset.rows, view.numbers
        buckets = data.buckets[self.numbers] if len(getattr(data, "buckets", ())) else np.zeros_like(self.numbers)
        self.key, self.shapes = "", []
        self.shards: list[tuple[int, np.ndarray]] = []
        for bucket, first in zip(*np.unique(buckets, return_index=True)):
            self.shapes.append(self._shape(first))
            rows = np.flatnonzero(buckets == bucket)
            self.shards += [(len(self.shapes) - 1, rows[a : a + shard]) for a in range(0, len(rows), shard)]

    def _shape(self, row: int) -> tuple[int, ...]:
        batch = self.rows.fetch(np.array([row]))
        self.key = next((key for key in ("video", "image") if key in batch), "")
        if not self.key:
            raise UserError(f"encode: the data's batches have {', '.join(sorted(batch))}; expected image or video")
        return tuple(self.autoencoder.latent_shape(tuple(batch[self.key].shape[1:])))

    def manifest(self) -> dict[str, Any]:
        """What the folder is."""
        return {
            "version": VERSION,
            "data": self.data.fingerprint,
            "autoencoder": self.autoencoder.identity(),
            "dtype": self.dtype,
            "key": self.key,
            "shapes": [list(shape) for shape in self.shapes],
            "shards": [[bucket, len(rows)] for bucket, rows in self.shards],
            "num_classes": self.data.num_classes,
            "class_names": list(getattr(self.data, "class_names", [])),
        }

    def write(
        self,
        folder: Path,
        *,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
        tick: Callable[[int], None] = lambda n: None,
    ) -> int:
        """Encodes what is missing in `folder`; rank r of `world` makes every world-th missing shard.

        Args:
            folder: New, or left by an earlier call for the same data and autoencoder.
            rank: This process.
            world: Number of processes that call this with the same arguments.
            barrier: Waits for all of them.
            tick: Told the number of rows as they are there (found or made).

        Returns:
            The number of rows that this process encoded.

        Raises:
            UserError: the folder holds other latents, or can't be written; codes that are not finite.
        """
        manifest = self.manifest()
        if rank == 0:
            begin(folder, manifest)
        barrier()
        left = missing(folder, manifest)
        tick(sum(len(rows) for number, (_, rows) in enumerate(self.shards) if number not in left))
        barrier()
        made = 0
        for number, parts in zip(left[rank::world], self._shards(left[rank::world], tick)):
            tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "text"}
            sums = channel_sums(tensors["mean"], tensors.get("std"), tensors["split"] == 0)
            side = {"text": [texts for part in parts for texts in part["text"]], "sums": sums}
            kept = {key: self._stored(key, value) for key, value in tensors.items()}
            if not (folder / MANIFEST).exists():
                written(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
            path = shard_file(folder, number)
            written(path.with_suffix(".json"), json.dumps(side, ensure_ascii=False).encode())
            written(path, save(kept))
            made += len(kept["index"])
        barrier()
        return made

    def _stored(self, key: str, value: Tensor) -> Tensor:
        return (value.to(getattr(torch, self.dtype)) if key in ("mean", "std") else value).contiguous()

    def _shards(self, numbers: list[int], tick: Callable[[int], None]) -> Iterator[list[dict[str, Any]]]:
        """The batches of each shard, encoded."""
        size, rows = self.batch, [self.shards[number][1] for number in numbers]
        batches = [part[a : a + size] for part in rows for a in range(0, len(part), size)]
        options = {"batch_sampler": batches, "num_workers": self.data.num_workers, "collate_fn": _as_is}
        loaded = iter(DataLoader(guarded(self.rows), **options))
        for part in rows:
            found = []
            for _ in range(0, len(part), size):
                batch = next(loaded)
                if isinstance(batch, UserError):
                    raise UserError(str(batch))
                found.append(self._encoded(batch))
                tick(len(found[-1]["index"]))
            yield found

    @torch.no_grad()
    def _encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        index = batch["index"]
        pictures = self.data.finished({self.key: batch[self.key].to(self.device)})[self.key]
        mean, std = self.autoencoder.law(pictures)
        found = {"mean": mean.cpu()} | ({} if std is None else {"std": std.cpu()})
        for value in found.values():
            if bad := (~value.to(getattr(torch, self.dtype)).flatten(1).isfinite().all(1)).nonzero().flatten().tolist():
                raise UserError(
                    f"encode: the code of sample {int(index[bad[0]])} has NaN, infinite or too large numbers for "
                    f"{self.dtype}; expected finite ones"
                )
        captions = getattr(self.data, "captions", None)
        if captions:
            text = [list(captions[number]) for number in index.tolist()]
        else:
            text = [[caption] for caption in batch.get("text", ())]
        split = torch.full_like(index, len(SPLITS), dtype=torch.uint8)
        for number, name in reversed(list(enumerate(SPLITS))):
            split[torch.from_numpy(np.isin(index.numpy(), self.data.numbers[name]))] = number
        labels = {"label": batch["label"]} if "label" in batch else {}
        return found | {"index": index, "split": split, "text": text} | labels


def begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Checks the manifest that is there, or that the folder is new or empty.

    Raises:
        UserError: it holds other latents, or something else.
    """
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        for key, expected in manifest.items():
            if found.get(key) == json.loads(json.dumps(expected)):
                continue
            what = {"data": "of other data", "autoencoder": "of another autoencoder"}.get(key, f"with another {key}")
            raise UserError(f"encode out={folder}: holds latents made {what}; give another folder")
    elif folder.exists() and (not folder.is_dir() or any(path.suffix != ".part" for path in folder.iterdir())):
        raise UserError(f"encode out={folder}: not empty and without {MANIFEST}; expected a new or empty folder")
    for part in folder.glob(".*.part"):
        part.unlink()


def _as_is(batch: Any) -> Any:
    return batch
