"""Videos and images in one training: every batch is of one kind, drawn for all ranks alike."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from penstock.datamodules.base import KindDataModule, Split, View, fingerprint
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader
from penstock.lightning_modules.errors import UserError

APART = 2**32  # between the numbers of videos and those of images


class MixedBatchSampler(KeyedBatchSampler):
    """Batches of one set, some of which are replaced by the next batch of another; rows of that are `-1 - row`.

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
        others = list(self.others) if turns.any() else []
        number = np.cumsum(turns) - 1
        for k, batch in enumerate(self.own, self.start):
            yield -1 - others[number[k] % len(others)] if turns[k] else batch

    def __len__(self) -> int:
        return len(self.own)


class _MixedView:
    """Rows of a view of videos, and below 0 those of a view of images."""

    def __init__(self, videos: View, images: View) -> None:
        self.videos, self.images = videos, images

    def __len__(self) -> int:
        return len(self.videos)

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        if rows[0] >= 0:
            return self.videos.fetch(rows)
        batch = self.images.fetch(-1 - rows)
        if "video" in batch:
            batch["image"] = batch.pop("video")[:, 0]
        return {**batch, "index": batch["index"] + APART}


class Mixed(KindDataModule):
    """Training batches are of `video`, or with chance `share` of `image`; all else is that of `video`.

    Image batches have `image` in place of `video`, `index` from 2^32 on, and the batch size of `image`. A batch of
    videos that images take the place of is left out. Of clips, `image` shows the first frame.

    Args:
        video: videos; its batch sizes, workers and seed are those of the whole.
        image: images, or clips of one frame.
        share: of the training batches that are images, in [0, 1].

    Raises:
        UserError: a share out of range, or images of other channels than the videos have.
    """

    def __init__(self, video: KindDataModule, image: KindDataModule, share: float = 0.2) -> None:
        super().__init__(
            batch_size=video.batch_size,
            eval_batch_size=video.eval_batch_size,
            num_workers=video.num_workers,
            seed=video.seed,
            pixels=video.pixels,
        )
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
        self.shape, self.num_classes, self.class_names = video.shape, video.num_classes, video.class_names
        self.fingerprint = fingerprint("mixed", video.fingerprint, image.fingerprint, self.share)
        if hasattr(video, "prompts"):
            self.prompts = video.prompts
        return video.store, video.numbers

    def train_dataloader(self) -> KeyedLoader:
        own, images = self.video.train_dataloader().batch_sampler, self.image.view("train")
        rows, others = _MixedView(self.view("train"), images), self.image.train_batches(len(images))
        return KindDataModule.loader(self, rows, MixedBatchSampler(own, others, self.share))

    def reference_dataloader(self, split: Split = "train") -> KeyedLoader:
        return self.video.reference_dataloader(split)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        side = self.image if "image" in batch else self.video
        return side.on_after_batch_transfer(batch, dataloader_idx)

    def _eval_loader(self, split: Split) -> KeyedLoader:
        return self.video._eval_loader(split)
