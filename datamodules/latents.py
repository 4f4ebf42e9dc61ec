"""Latents that `penstock encode` wrote, in place of the pictures that they are of."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, View, fingerprint
from penstock.datamodules.image_text import Prompts
from penstock.datamodules.latent_store import ByNumber, LatentStore
from penstock.datamodules.sampling import BucketedBatchSampler, KeyedBatchSampler, KeyedLoader
from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.latent_shards import (
    SPLITS,
    check_complete,
    check_space,
    read_manifest,
    statistics,
)
from penstock.lightning_modules.nets.autoencoder import Autoencoder


class CachedLatents(KindDataModule):
    """Batches `latent` float32, `text` (where there are captions, or else the number of the class), `label`, `index`.

    Splits and numbers are those of the data that were encoded. The encoder's noise is drawn anew each time, keyed by
    (seed, epoch, index) as a module draws it that encodes the same pictures itself, so that both train alike. A module
    with another autoencoder than the one that made the folder is refused.

    Args:
        folder: Of latents.
        real: The data that were encoded, which metrics compare samples with; None does without such metrics.
        standardise: Give every channel mean 0 and deviation 1 over the training data; the model's autoencoder then has
            `statistics` of the same folder. Otherwise latents are scaled as the autoencoder's configuration says.
        posterior: `sample` draws the encoder's noise, `mean` leaves it out.
        batch_size: Global training batch.
        eval_batch_size: Global batch of evaluation; None is `batch_size`.
        num_workers: Worker processes a rank.
        seed: Key of order, noise and captions; None is the seed of the run.

    Attributes:
        texts: Prompts by number, made of the training captions; after `setup`.

    Raises:
        UserError: a folder that is none of latents, is not complete or damaged.
    """

    texts: Prompts

    def __init__(
        self,
        folder: str,
        real: KindDataModule | None = None,
        standardise: bool = False,
        posterior: Literal["sample", "mean"] = "sample",
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        self.folder, self.real, self.standardise, self.posterior = Path(folder), real, standardise, posterior
        self.standard: tuple[Tensor, Tensor] | None = None

    def prepare_data(self) -> None:
        if self.real is not None:
            self.real.prepare_data()

    def build(self) -> tuple[LatentStore, dict[str, np.ndarray]]:
        manifest = self.manifest = read_manifest(self.folder)
        check_complete(self.folder, manifest)
        store = LatentStore(self.folder, manifest)
        self.shapes = [tuple(shape) for shape in manifest["shapes"]]
        self.shape, self.num_classes = self.shapes[0], manifest["num_classes"]
        self.class_names = manifest["class_names"]
        if self.standardise:
            mean, std = statistics(self.folder)
            self.standard = mean[:, None, None], std[:, None, None]
        numbers = {name: store.index[store.split == place] for place, name in enumerate(SPLITS)}
        self.texts = Prompts(ByNumber(store), numbers["train"])
        known = json.dumps(manifest, sort_keys=True)
        self.fingerprint = fingerprint("latents", known, self.standardise, self.posterior)
        return store, numbers

    def shape_for(self, autoencoder: Autoencoder) -> tuple[int, ...]:
        """Shape of the latents, once they are known to be an autoencoder's.

        Raises:
            UserError: they are of another space.
        """
        check_space(self.folder, self.manifest, autoencoder.identity())
        own, theirs = self.standard, getattr(autoencoder, "standard", None)
        if (own is None) != (theirs is None) or (own and not all(torch.equal(a, b) for a, b in zip(own, theirs))):
            found = "statistics of another folder" if own and theirs else "no statistics" if own else "statistics"
            expected = f"model.autoencoder.statistics={self.folder}" if own else "none, or data.standardise=true"
            raise UserError(
                f"data.standardise={str(self.standardise).lower()}: model.autoencoder has {found}, expected {expected}"
            )
        return self.shape

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], Tensor | None]:
        """First captions, and classes int64 `(n,)` if there are any, of a split's first `n` samples, over and over."""
        rows = self.store.places(np.resize(self.view(split).numbers, n))
        labels = torch.from_numpy(self.store.label[rows]) if self.num_classes else None
        return [self.store.text[row][0] for row in rows], labels

    def loader(self, rows: View, batches: KeyedBatchSampler, collate: Any = None) -> KeyedLoader:
        """A loader of whole batches, each of one shape."""
        if len(self.shapes) > 1:
            options = {"rank": batches.rank, "world": batches.world, "drop_last": batches.drop_last}
            buckets = self.store.bucket[self.store.places(rows.numbers)]
            try:
                batches = BucketedBatchSampler(batches.sampler, batches.batch_size, buckets=buckets, **options)
            except ValueError as error:
                raise UserError(f"latents '{self.folder}': {error}") from error
        return super().loader(rows, batches, collate)

    def reference_dataloader(self, split: Split = "train") -> KeyedLoader:
        """The pictures themselves.

        Raises:
            UserError: there is no `real`.
        """
        if self.real is None:
            raise UserError("data.real: found none; expected the data that were encoded, to compare samples with")
        self.real.trainer, self.real.eval_batch_size = self.trainer, self.eval_batch_size
        self.real.setup()
        return self.real.reference_dataloader(split)

    @property
    def reference_fingerprint(self) -> str:
        """Of the pictures that `reference_dataloader` gives."""
        self.reference_dataloader("all")
        return self.real.fingerprint

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """One caption of each sample: keyed by (seed, epoch, index) in training, else the first."""
        if "text" not in batch:
            return batch
        texts = batch["text"]
        if self.trainer is None or not self.trainer.training or max(map(len, texts)) == 1:
            return {**batch, "text": [own[0] for own in texts]}
        chosen = self.draws(batch["index"]).uniform("caption").tolist()
        return {**batch, "text": [own[int(u * len(own))] for own, u in zip(texts, chosen)]}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """The latents with their encoder's noise, standardised where that is asked for."""
        training = self.trainer is not None and self.trainer.training
        draws = self.draws(batch["index"]) if training else Draws(0, 0, batch["index"])
        kept = {key: value for key, value in batch.items() if key not in ("mean", "std")}
        latent = batch["mean"].float()
        if "std" in batch and self.posterior == "sample":
            latent = latent + batch["std"].float() * draws.normal("autoencoder", tuple(latent.shape[1:]))
        if self.standard is not None:
            mean, std = (part.to(latent.device, non_blocking=True) for part in self.standard)
            latent = (latent - mean) / std
        return {**kept, "latent": latent}
