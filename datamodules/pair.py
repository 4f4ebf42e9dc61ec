"""Two data sets for flows from data to data."""

from typing import Any, Literal

import numpy as np
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, View, fingerprint
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader, PartneredBatchSampler
from penstock.lightning_modules.errors import UserError


class _PairView:
    """Rows `(2, b)`: of the target view and of the source view, whose data come under the key `source`."""

    def __init__(self, target: View, source: View, key: str) -> None:
        self.target, self.source, self.key = target, source, key

    def __len__(self) -> int:
        return len(self.target)

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        return {**self.target.fetch(rows[0]), "source": self.source.fetch(rows[1])[self.key]}


class Pair(KindDataModule):
    """Batches of `target` with an independent `source` sample each (arXiv 2209.03003 section 2.1: pi_0 x pi_1).

    The source sample of a target sample is uniform over the source set and keyed by (seed, epoch, row). Scaling, flips
    and dequantisation are those of the two data sets. `shape`, classes and `index` are the target's. Evaluation draws
    from the source's own split and the pairs are always the same.

    Args:
        source: data at t = 0. Its batch sizes, workers and seed are not used.
        target: data at t = 1; its batch sizes, workers and seed are those of the pair.

    Raises:
        UserError: the two sets hold samples of different shape or kind.
    """

    def __init__(self, source: KindDataModule, target: KindDataModule) -> None:
        super().__init__(
            batch_size=target.batch_size,
            eval_batch_size=target.eval_batch_size,
            num_workers=target.num_workers,
            seed=target.seed,
            pixels=target.pixels,
        )
        self.source, self.target = source, target

    def prepare_data(self) -> None:
        self.source.prepare_data()
        self.target.prepare_data()

    def build(self) -> tuple[Any, dict[str, np.ndarray]]:
        for side in (self.source, self.target):
            if side.store is None:
                side.store, side.numbers = side.build()
        source, target = self.source, self.target
        if (source.shape, source.levels > 0) != (target.shape, target.levels > 0):
            raise UserError(
                f"data.source: found {type(source).__name__} samples of shape {source.shape}, expected the target's "
                f"({type(target).__name__}) shape {target.shape}"
            )
        self.shape, self.num_classes, self.class_names = target.shape, target.num_classes, target.class_names
        self.fingerprint = fingerprint("pair", source.fingerprint, target.fingerprint)
        self._key = "image" if target.levels else "points"
        return target.store, target.numbers

    def train_dataloader(self) -> KeyedLoader:
        return self._paired("train", self.train_batches(len(self.numbers["train"])))

    def reference_dataloader(self, split: Split = "train", of: Literal["target", "source"] = "target") -> KeyedLoader:
        """Reference of the target set, or of the source set for the way back (target to source)."""
        if of == "target":
            return super().reference_dataloader(split)
        self.source.trainer, self.source.eval_batch_size = self.trainer, self.eval_batch_size
        return self.source.reference_dataloader(split)

    def sources(self, view: View, rows: np.ndarray) -> Tensor:
        """Source samples `(b, *shape)` of rows `(b,)` of a view of the source, as evaluation sees them."""
        return self.source.finished(view.fetch(rows))[self._key]

    def starts(self, n: int) -> Tensor:
        """The first source samples `(n, *shape)` of the test split, or all of them: where the flow starts."""
        view = self.source.view("test")
        return self.sources(view, np.arange(min(n, len(view))))

    def finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().finished(batch)
        if "source" not in batch or batch["source"].is_floating_point():
            return batch
        return {**batch, "source": self.source.pixels.scale(batch["source"])}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        raw = batch.get("source")
        if self.trainer and self.trainer.training and raw is not None and not raw.is_floating_point():
            augmented = self.source.pixels.augment(raw, self.draws(batch["index"]), prefix="source_")
            batch = {**batch, "source": augmented}
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def _eval_loader(self, split: Split) -> KeyedLoader:
        return self._paired(split, self.eval_batches(len(self.view(split))))

    def _paired(self, split: Split, own: KeyedBatchSampler) -> KeyedLoader:
        source = self.source.view(split)
        batches = PartneredBatchSampler(
            own.sampler, own.batch_size, others=len(source), rank=own.rank, world=own.world, drop_last=own.drop_last
        )
        return self.loader(_PairView(self.view(split), source, self._key), batches)
