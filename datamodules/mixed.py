"""Videos, images and short clips in one training: every batch is of one kind, drawn for all ranks alike."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, fingerprint
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader, Rows
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoencoder import Autoencoder

APART = 2**32  # between the numbers of videos, those of images and those of short clips
MOVING = ("video", "mean", "std")
STILLS = {"video": "image"}
VIDEO, IMAGE = 0, 1


class MixedBatchSampler(KeyedBatchSampler):
    """Batches of one set, some of which are replaced by the next batch of another, with numbers `APART` further on.

    Which ones are replaced depends on (seed, epoch, number of the batch) alone, so all ranks agree.

    Args:
        own: batches of the set that sets the length of an epoch.
        others: batches of other sets, each over and over within an epoch.
        shares: of the batches that each of them replaces, in [0, 1], at most 1 together.
    """

    def __init__(self, own: KeyedBatchSampler, others: Sequence[KeyedBatchSampler], shares: Sequence[float]) -> None:
        self.own, self.others, self.shares = own, others, shares
        self.sampler, self.start = own.sampler, 0

    def turns(self) -> np.ndarray:
        """Set of each batch of this epoch, int `(len(self),)`: 0 is the own, 1 the first of the others."""
        drawn = np.random.default_rng((self.sampler.seed, self.sampler.epoch, 3)).random(len(self))
        return (np.searchsorted(np.cumsum(self.shares), drawn, side="right") + 1) % (1 + len(self.shares))

    def __iter__(self) -> Iterator[np.ndarray]:
        turns, self.own.start = self.turns(), self.start
        gone = np.bincount(turns[: self.start], minlength=1 + len(self.others))
        others = [self._again(other, int(n)) for other, n in zip(self.others, gone[1:], strict=True)]
        for turn, batch in zip(turns[self.start :], self.own, strict=True):
            yield batch if turn == VIDEO else next(others[turn - 1]) + turn * APART

    def _again(self, other: KeyedBatchSampler, first: int) -> Iterator[np.ndarray]:
        """Batches of another set from number `first` on, over and over."""
        other.start = first % len(other)
        while True:
            yield from other
            other.start = 0

    def __len__(self) -> int:
        return len(self.own)


class _MixedView:
    """What the loader of videos reads, and by numbers from `APART` on what the other loaders read."""

    def __init__(self, *sides: Rows) -> None:
        self.sides = sides

    def __len__(self) -> int:
        return len(self.sides[VIDEO])

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        side = int(rows.flat[0]) // APART
        batch = self.sides[side].fetch(rows % APART)
        if side == IMAGE:
            stills = {STILLS.get(key, key): batch[key][:, 0] for key in MOVING if key in batch and batch[key].ndim == 5}
            batch = {**{key: value for key, value in batch.items() if STILLS.get(key, key) not in stills}, **stills}
        return {**batch, "index": batch["index"] + side * APART}


class Mixed(KindDataModule):
    """Training batches are of `video`, or with chance of `image` or `short`; all else is that of `video`.

    Image batches have `image` in place of `video`, `index` from 2^32 on, and the batch size of `image`; those of short
    clips `index` from 2^33 on, and the batch size of `short`. A batch of videos that others take the place of is left
    out. Of clips, `image` shows the first frame. All may be latents; captions, aspects and all that is random in each
    are its own.

    Args:
        video: videos; its seed is that of the whole.
        image: images, or clips of one frame.
        share: of the training batches that are images, in [0, 1].
        short: videos of fewer frames; None = none.
        short_share: of the training batches that are short clips, in [0, 1]; with `share` at most 1.
        batch_size: global training batch of videos; None = that of `video`.
        eval_batch_size: global batch of evaluation; None = `batch_size`, or that of `video`.
        num_workers: worker processes a rank; None = those of `video`.

    Raises:
        UserError: a share out of range or of nothing, samples of other channels than the videos have, short clips that
            are not shorter, or latents beside pictures.
    """

    def __init__(
        self,
        video: KindDataModule,
        image: KindDataModule,
        share: float = 0.2,
        short: KindDataModule | None = None,
        short_share: float = 0.0,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=video.batch_size if batch_size is None else batch_size,
            eval_batch_size=eval_batch_size or batch_size or video.eval_batch_size,
            num_workers=video.num_workers if num_workers is None else num_workers,
            seed=video.seed,
            pixels=video.pixels,
        )
        video.batch_size, video.eval_batch_size = self.batch_size, self.eval_batch_size
        self.sides, self.shares = [video, image], [share]
        if not 0 <= share <= 1:
            raise UserError(f"data.share: found {share}, expected a number in [0, 1]")
        if not 0 <= short_share <= 1 - share:
            raise UserError(f"data.short_share: found {short_share}, expected a number in [0, {1 - share:g}]")
        if short is not None:
            self.sides.append(short)
            self.shares.append(short_share)
        elif short_share:
            raise UserError(f"data.short_share: found {short_share} without data.short, expected 0, or short clips")
        for side in self.sides:
            side.num_workers = self.num_workers
        self.video, self.image, self.short, self.share = video, image, short, share

    def prepare_data(self) -> None:
        for side in self.sides:
            side.prepare_data()

    def build(self) -> tuple[Any, dict[str, np.ndarray]]:
        for side in self.sides:
            side.trainer = self.trainer
            side.setup()
        video, image = self.video, self.image
        if len(video.shape) != 4 or image.shape[-3] != video.shape[-3]:
            raise UserError(
                f"data.image: found samples of shape {image.shape} beside videos of {video.shape}; expected frames "
                f"{video.shape[1:]} of (T, C, H, W)"
            )
        if self.short is not None and not (
            self.short.shape[1] == video.shape[1] and self.short.shape[0] < video.shape[0]
        ):
            raise UserError(
                f"data.short: found samples of shape {self.short.shape} beside videos of {video.shape}; expected fewer "
                "frames of as many channels"
            )
        encoded = [hasattr(side, "shape_for") for side in self.sides]
        for name, found in zip(("image", "short"), encoded[1:]):
            if found != encoded[VIDEO]:
                raise UserError(f"data.{name}: found latents beside pictures; expected all encoded, or none")
        if all(encoded):
            self.shape_for = self._shape_for
        self.shape, self.num_classes, self.class_names = video.shape, video.num_classes, video.class_names
        self.sourced = video.sourced
        self.fingerprint = fingerprint("mixed", *(side.fingerprint for side in self.sides), *self.shares)
        for name in ("prompts", "texts"):
            if hasattr(video, name):
                setattr(self, name, getattr(video, name))
        return video.store, video.numbers

    def _shape_for(self, autoencoder: Autoencoder) -> tuple[int, ...]:
        """Shape of the videos' latents, once all are known to be an autoencoder's; see `CachedLatents.shape_for`."""
        return [side.shape_for(autoencoder) for side in self.sides][VIDEO]

    def train_dataloader(self) -> KeyedLoader:
        loaders = [side.train_dataloader() for side in self.sides]
        own, *others = (loader.batch_sampler for loader in loaders)
        rows = _MixedView(*(loader.dataset.rows for loader in loaders))
        return KindDataModule.loader(self, rows, MixedBatchSampler(own, others, self.shares))

    def reference_dataloader(self, split: Split = "train") -> KeyedLoader:
        return self.video.reference_dataloader(split)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self._side(batch).on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self._side(batch).on_after_batch_transfer(batch, dataloader_idx)

    def finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._side(batch).finished(batch)

    def sources(self, rows: Tensor, split: Split = "test") -> Tensor:
        return self.video.sources(rows, split)

    def _side(self, batch: dict[str, Any]) -> KindDataModule:
        """Where a batch comes from: frames, of pixels or of latents, have one axis more than images."""
        data = next((batch[key] for key in (*MOVING, "latent") if key in batch), None)
        if data is None or data.ndim == 4:
            return self.image
        return self.video if self.short is None or data.shape[1] == self.video.shape[0] else self.short

    def _eval_loader(self, split: Split) -> KeyedLoader:
        return self.video._eval_loader(split)
