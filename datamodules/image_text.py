"""Images with captions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, Store, View, find_folder, fingerprint
from penstock.datamodules.caption_sources import Captioned, open_captioned
from penstock.datamodules.digits import Digits
from penstock.datamodules.image_sources import Source
from penstock.datamodules.images import Images
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader, PartneredBatchSampler
from penstock.lightning_modules.errors import UserError

DIGITS = "digits"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {}",
    "a photo of the digit {}",
    "the number {}",
    "someone wrote the number {}",
    "{}, written by hand",
    "a small grey {}",
)
CHOICES = 2**31


class CaptionedView:
    """A split whose batches have `text`, one caption of each sample.

    Rows `(b,)` get the first caption, rows `(2, b)` the one that the second line of numbers chooses.
    """

    def __init__(self, view: View, captions: list[tuple[str, ...]]) -> None:
        self.view, self.captions = view, captions

    def __len__(self) -> int:
        return len(self.view)

    def fetch(self, rows: np.ndarray) -> dict[str, Any]:
        rows, choices = rows if rows.ndim == 2 else (rows, np.zeros_like(rows))
        found = [self.captions[number] for number in self.view.numbers[rows]]
        return {**self.view.fetch(rows), "text": [texts[c % len(texts)] for texts, c in zip(found, choices.tolist())]}


@dataclass(frozen=True)
class Prompts:
    """Prompts of any numbers >= 0: captions of `numbers`, over and over, in all wordings."""

    captions: list[tuple[str, ...]]
    numbers: np.ndarray

    def __call__(self, rows: Tensor | np.ndarray) -> list[str]:
        """One text for each of `rows` `(b,)`."""
        turns, places = np.divmod(torch.as_tensor(rows).cpu().numpy(), len(self.numbers))
        found = [self.captions[number] for number in self.numbers[places]]
        return [texts[turn % len(texts)] for texts, turn in zip(found, (turns + places).tolist())]


class _CaptionedImages(Images):
    """Images whose sources bring captions."""

    def __init__(self, captions: str | None, caption_column: str | None, **options: Any) -> None:
        super().__init__(**options)
        self.captions_file, self.caption_column = captions, caption_column
        self.found: dict[str, Captioned] = {}

    def sources(self, *, download: bool = False) -> dict[str, Source]:
        short = self.name.split("/")[-1]
        folder = find_folder(short, self.data_dir)
        if folder is None and "/" not in self.name:
            raise UserError(
                f"data.data_dir: no folder for '{self.name}' (looked for $PENSTOCK_DATA/{short}); set "
                "data.data_dir=FOLDER or PENSTOCK_DATA, or give a hub id 'owner/set' as data.name"
            )
        columns = (self.image_column, self.caption_column, self.label_column)
        self.found = open_captioned(self.name, folder, self.captions_file, *columns)
        return {split: part.images for split, part in self.found.items()}

    def captions(self) -> list[tuple[str, ...]]:
        """Captions of every image, in the order of the numbers; after `build`."""
        return [texts for part in self.found.values() for texts in part.captions]


class ImageText(KindDataModule):
    """Images `(C, H, W)` in [-1, 1] with `text`, a caption of each; `label` where classes are known.

    `name=digits` is the embedded default: scikit-learn's digits, captioned from their class in six wordings ("a
    handwritten seven", "the number seven" ...). Anything else lies in `data_dir` or `$PENSTOCK_DATA/<name>`, or is a
    hub id with a slash. A folder holds

    - tar shards as webdataset lays them out: `0001.jpg` and `0001.txt` (or `0001.json` with `caption`), maybe `.cls`;
    - or parquet files with a column of encoded images and one of captions;
    - or images and `captions.jsonl` (`{"file": "a.png", "text": "a cat"}` a line) or `captions.csv`; further lines of a
      file are further captions.

    optionally under `train/`, `val/`, `test/`. Which caption of several a training batch has is keyed by (seed, epoch,
    row); evaluation has the first.

    Args:
        name: `digits`, a hub id, or a plain name for messages and `$PENSTOCK_DATA`.
        data_dir: folder of the data.
        captions: name of the captions file; `None` = `captions.jsonl`, `captions.csv`, `metadata.jsonl` or `.csv`.
        image_size: resize the shorter side (bicubic) and crop the centre square; `None` = images of one size as is.
        channels: 1 (grey) or 3 (RGB).
        convert: convert images of another number of channels (an error otherwise).
        image_column: of parquet and hub sets; `None` = the first common name.
        caption_column: likewise.
        label_column: likewise; `None` = the first common name, or no labels.
        val_fraction: part of the training images held out, in [0, 1), where the set has no validation split of its own.
        limit: at most so many images a split, evenly spaced through it; `None` = all.
        flip: mirror half of the training images; captions that say left or right become wrong.
        memory_gb: decoded images are kept in memory when all fit in this many GB; 0 = decode in the workers each time.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of order, captions and flips; `None` = the seed of the run.

    Attributes:
        texts: prompts by number, made of the training captions; after `setup`.

    Raises:
        UserError: anything wrong with the data; the file, row or key is named.
    """

    texts: Prompts

    def __init__(
        self,
        name: str = DIGITS,
        data_dir: str | None = None,
        captions: str | None = None,
        image_size: int | None = None,
        channels: int = 3,
        convert: bool = True,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        val_fraction: float = 0.1,
        limit: int | None = None,
        flip: bool = False,
        memory_gb: float = 4.0,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        if name == DIGITS and data_dir is None:
            images: KindDataModule = Digits(val_fraction=val_fraction)
        else:
            images = _CaptionedImages(
                captions,
                caption_column,
                name=name,
                data_dir=data_dir,
                image_size=image_size,
                channels=channels,
                convert=convert,
                image_column=image_column,
                label_column=label_column,
                val_fraction=val_fraction,
                limit=limit,
                flip=flip,
                memory_gb=memory_gb,
            )
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=images.pixels,
        )
        self.images = images
        self.captions: list[tuple[str, ...]] = []
        self.classes: Tensor | None = None

    def prepare_data(self) -> None:
        self.images.prepare_data()

    def build(self) -> tuple[Store, dict[str, np.ndarray]]:
        store, numbers = self.images.build()
        if isinstance(self.images, _CaptionedImages):
            self.captions, self.classes = self.images.captions(), store.labels
        else:
            self.classes = store.tensors["label"]
            wordings = [tuple(template.format(name) for template in TEMPLATES) for name in NAMES]
            self.captions = [wordings[label] for label in self.classes.tolist()]
        self.texts = Prompts(self.captions, numbers["train"])
        self.shape, self.num_classes = self.images.shape, self.images.num_classes
        self.class_names = self.images.class_names
        self.fingerprint = fingerprint("image_text", self.images.fingerprint, repr(self.captions).encode())
        return store, numbers

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], Tensor | None]:
        """First captions, and classes int64 `(n,)` if there are any, of the first `n` samples of a split.

        A split of fewer samples begins again.
        """
        numbers = np.resize(self.view(split).numbers, n)
        labels = self.classes[torch.from_numpy(numbers)] if self.num_classes else None
        return [self.captions[number][0] for number in numbers], labels

    def train_dataloader(self) -> KeyedLoader:
        own = self.train_batches(len(self.numbers["train"]))
        options = {"rank": own.rank, "world": own.world, "drop_last": own.drop_last}
        batches = PartneredBatchSampler(own.sampler, own.batch_size, others=CHOICES, **options)
        return self.loader(self.view("train"), batches)

    def loader(self, rows: View, batches: KeyedBatchSampler, collate: Any = None) -> KeyedLoader:
        """A loader of whole batches with `text`."""
        return super().loader(CaptionedView(rows, self.captions), batches, collate)
