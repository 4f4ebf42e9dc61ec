"""Videos and images in one training: every batch is of one kind, drawn for all ranks alike."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, fingerprint
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader, Rows
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoencoder import Autoencoder

APART = 2**32  # between the numbers of videos and those of images
MOVING = ("video", "mean", "std")
STILLS = {"video": "image"}


class MixedBatchSampler(KeyedBatchSampler):
    """Batches of one set, some of which are replaced by the next batch of another, whose numbers become `-1 - number`.

    Which ones are replaced depends on (seed, epoch, number of the batch) alone, so all ranks agree.

    Args:
        own: batches of the set that sets the length of an epoch.
        others: batches of the other, over and over within an epoch.
        share: of the batches that are replaced, in [0, 1].
    """

    def __init__(self, own: KeyedBatchSampler, others: KeyedBatchSampler, share: float) -> None:
        self.own, self.others, self.share = own, others, share
        self.sampler, self.start = own.sampler, 0

    def turns(self) -> np.ndarray:
        """Which batches of this epoch come from the other set, bool `(len(self),)`."""
        return np.random.default_rng((self.sampler.seed, self.sampler.epoch, 3)).random(len(self)) < self.share

    def __iter__(self) -> Iterator[np.ndarray]:
        turns, self.own.start = self.turns(), self.start
        others = self._others(int(turns[: self.start].sum()))
        for k, batch in enumerate(self.own, self.start):
            yield -1 - next(others) if turns[k] else batch

    def _others(self, first: int) -> Iterator[np.ndarray]:
        """Batches of the other set from number `first` on, over and over."""
        self.others.start = first % len(self.others)
        while True:
            yield from self.others
            self.others.start = 0

    def __len__(self) -> int:
        return len(self.own)


class _MixedView:
    """What the loader of videos reads, and of numbers below 0 what that of images reads."""

    def __init__(self, videos: Rows, images: Rows) -> None:
        self.videos, self.images = videos, images

    def __len__(self) -> int:
        return len(self.videos)

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        if rows.flat[0] >= 0:
            return self.videos.fetch(rows)
        batch = self.images.fetch(-1 - rows)
        stills = {STILLS.get(key, key): batch[key][:, 0] for key in MOVING if key in batch and batch[key].ndim == 5}
        rest = {key: value for key, value in batch.items() if STILLS.get(key, key) not in stills}
        return {**rest, **stills, "index": batch["index"] + APART}


class Mixed(KindDataModule):
    """Training batches are of `video`, or with chance `share` of `image`; all else is that of `video`.

    Image batches have `image` in place of `video`, `index` from 2^32 on, and the batch size of `image`. A batch of
    videos that images take the place of is left out. Of clips, `image` shows the first frame. Both may be latents;
    captions, aspects and all that is random in either are its own.

    Args:
        video: videos; its seed is that of the whole.
        image: images, or clips of one frame.
        share: of the training batches that are images, in [0, 1].
        batch_size: global training batch of videos; None = that of `video`.
        eval_batch_size: global batch of evaluation; None = `batch_size`, or that of `video`.
        num_workers: worker processes a rank; None = those of `video`.

    Raises:
        UserError: a share out of range, images of other channels than the videos have, or latents beside pictures.
    """

    def __init__(
        self,
        video: KindDataModule,
        image: KindDataModule,
        share: float = 0.2,
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
        video.num_workers = image.num_workers = self.num_workers
        if not 0 <= share <= 1:
            raise UserError(f"data.share: found {share}, expected a number in [0, 1]")
        self.video, self.image, self.share = video, image, share

    def prepare_data(self) -> None:
        self.video.prepare_data()
        self.image.prepare_data()

    def build(self) -> tuple[Any, dict[str, np.ndarray]]:
        for side in (self.video, self.image):
            side.trainer = self.trainer
            side.setup()
        video, image = self.video, self.image
        if len(video.shape) != 4 or image.shape[-3] != video.shape[-3]:
            raise UserError(
                f"data.image: found samples of shape {image.shape} beside videos of {video.shape}; expected frames "
                f"{video.shape[1:]} of (T, C, H, W)"
            )
        encoded = [hasattr(side, "shape_for") for side in (video, image)]
        if encoded[0] != encoded[1]:
            raise UserError("data.image: found latents beside pictures; expected both encoded, or neither")
        if all(encoded):
            self.shape_for = self._shape_for
        self.shape, self.num_classes, self.class_names = video.shape, video.num_classes, video.class_names
        self.sourced = video.sourced
        self.fingerprint = fingerprint("mixed", video.fingerprint, image.fingerprint, self.share)
        for name in ("prompts", "texts"):
            if hasattr(video, name):
                setattr(self, name, getattr(video, name))
        return video.store, video.numbers

    def _shape_for(self, autoencoder: Autoencoder) -> tuple[int, ...]:
        """Shape of the videos' latents, once both are known to be an autoencoder's; see `CachedLatents.shape_for`."""
        self.image.shape_for(autoencoder)
        return self.video.shape_for(autoencoder)

    def train_dataloader(self) -> KeyedLoader:
        own, others = self.video.train_dataloader(), self.image.train_dataloader()
        rows = _MixedView(own.dataset.rows, others.dataset.rows)
        return KindDataModule.loader(self, rows, MixedBatchSampler(own.batch_sampler, others.batch_sampler, self.share))

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
        """Where a batch comes from: frames have one axis more than images, of pixels or of latents."""
        data = next((batch[key] for key in (*MOVING, "latent") if key in batch), None)
        return self.image if data is None or data.ndim == 4 else self.video

    def _eval_loader(self, split: Split) -> KeyedLoader:
        return self.video._eval_loader(split)
