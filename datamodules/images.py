"""Images of any origin through one DataModule."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.datamodules.base import KindDataModule, find_folder, fingerprint, held_out
from penstock.datamodules.image_sources import (
    Source,
    named,
    open_tables,
    open_torchvision,
    open_tree,
    turn_upright,
)
from penstock.datamodules.pixels import Pixels
from penstock.lightning_modules.errors import UserError, did_you_mean

MODE_OF = {1: "L", 3: "RGB"}
TORCHVISION = "torchvision:"
SPLIT_ORDER = ("train", "val", "test")


class ImageStore:
    """Images of several sources under one numbering, decoded on demand or once into memory.

    Args:
        sources: in the order of their numbers.
        labels: int64 `(n,)` of all images, or None.
        shape: (C, H, W) of every image.
        fit: resize the shorter side to H and crop the centre; otherwise an image of another size is an error.
        convert: convert images of another mode; otherwise they are an error.
        in_memory: keep decoded images.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: np.ndarray | None,
        shape: tuple[int, int, int],
        *,
        fit: bool,
        convert: bool,
        in_memory: bool,
    ) -> None:
        self.sources, self.shape, self.fit, self.convert = list(sources), shape, fit, convert
        self.labels = None if labels is None else torch.from_numpy(labels)
        self.first = np.cumsum([0, *map(len, sources)])
        self.kept = torch.empty((int(self.first[-1]), *shape), dtype=torch.uint8) if in_memory else None
        self.ready = np.zeros(self.first[-1], dtype=bool)

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        rows = torch.from_numpy(numbers)
        if self.kept is not None and self.ready[numbers].all():
            images = self.kept[rows]
        else:
            images = torch.from_numpy(self._decode_all(numbers))
        return {"image": images} if self.labels is None else {"image": images, "label": self.labels[rows]}

    def warm(self, numbers: np.ndarray) -> None:
        """Decodes `numbers` into memory, where images are kept there."""
        missing = numbers[~self.ready[numbers]]
        if self.kept is None or not len(missing):
            return
        blocks = np.array_split(missing, -(-len(missing) // 256))
        with ThreadPoolExecutor() as pool:
            for block, images in zip(blocks, pool.map(self._decode_all, blocks)):
                self.kept[torch.from_numpy(block)] = torch.from_numpy(images)
        self.ready[missing] = True

    def _decode_all(self, numbers: np.ndarray) -> np.ndarray:
        return np.stack([self.decode(n) for n in numbers])

    def decode(self, number: int) -> np.ndarray:
        """One image as uint8 (C, H, W).

        Raises:
            UserError: unreadable, truncated, not 8 bits, other channels, another size; the image is named.
        """
        source, row = self.place(number)
        image = self.load(source, row)
        channels, height, width = self.shape
        check_depth(image, source.where(row))
        if image.mode != MODE_OF[channels]:
            if not self.convert:
                bands = len(image.getbands())
                raise UserError(
                    f"{source.where(row)}: found {bands} channel{'s' * (bands > 1)} ({image.mode}), "
                    f"expected {channels} ({MODE_OF[channels]}); set data.convert=true to convert, or data.channels"
                )
            image = image.convert(MODE_OF[channels])
        if image.size != (width, height):
            if not self.fit:
                raise UserError(
                    f"{source.where(row)}: found {image.width}x{image.height} pixels, expected {width}x{height}; "
                    "set data.image_size to resize and crop"
                )
            image = self.resized(image)
        return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)

    def place(self, number: int) -> tuple[Source, int]:
        """Source and row of an image."""
        which = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.sources[which], int(number - self.first[which])

    def load(self, source: Source, row: int) -> Image.Image:
        """One image, read to its end, of any size and mode."""
        return load_image(source, row)

    def resized(self, image: Image.Image) -> Image.Image:
        """An image of another size at that of the store."""
        return centre_square(image, self.shape[1])


def load_image(source: Source, row: int) -> Image.Image:
    """One image, read to its end.

    Raises:
        UserError: the image is named.
    """
    with named(source.where(row)):
        image = source.open(row)
        image.load()
    return image


def load_upright(source: Source, row: int) -> Image.Image:
    """One image, read to its end and turned as the orientation in its EXIF data says.

    Raises:
        UserError: the image is named.
    """
    image = load_image(source, row)
    with named(source.where(row)):
        turn_upright(image)
    return image


def check_depth(image: Image.Image, where: str) -> None:
    """Refuses levels that 8 bits do not hold, which a conversion would cut off.

    Raises:
        UserError: so it is; the image is named by `where`.
    """
    if image.mode[0] in "IF":
        raise UserError(f"{where}: found {image.mode} pixels, expected 8 bits a channel")


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to `size` (bicubic, antialiased), then the central `size` x `size` square."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Images(KindDataModule):
    """Images `(C, H, W)`, 8 bits, scaled to [-1, 1].

    Where they are looked for: `data_dir`; else `$PENSTOCK_DATA/<last part of name>`; else a `name` with a slash is
    loaded from the Hugging Face hub, and `torchvision:Class` is downloaded into `$PENSTOCK_DATA`. A folder with parquet
    files is read as the hub lays sets out; any other folder is a tree of image files: class folders or bare images,
    optionally under `train/`, `val/`, `test/`. Without a test split the held-out images serve as test.

    Args:
        name: `uoft-cs/cifar10` (hub id), `torchvision:MNIST`, or a plain name for messages and `$PENSTOCK_DATA`.
        data_dir: folder of the data.
        image_size: resize the shorter side (bicubic) and crop the centre square; `None` = images of one size as is.
        channels: 1 (grey) or 3 (RGB).
        convert: convert images of another number of channels (an error otherwise).
        image_column: of parquet and hub sets; `None` = the first common name.
        label_column: likewise; `None` = the first common name, or no labels.
        classes: keep these classes only, numbered in this order; `None` = all.
        val_fraction: part of the training images held out, in [0, 1), where the set has no validation split of its own.
        limit: at most so many images a split, evenly spaced through it; `None` = all.
        flip: mirror half of the training images.
        dequantise: add uniform noise of one level to training images.
        memory_gb: decoded images are kept in memory when all fit in this many GB; 0 = decode in the workers each time.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; 0 is fastest for images in memory.
        seed: key of order, flips and dequantisation; `None` = the seed of the run.

    Raises:
        UserError: anything wrong with the data; the file, row or key is named.
    """

    def __init__(
        self,
        name: str = "uoft-cs/cifar10",
        data_dir: str | None = None,
        image_size: int | None = None,
        channels: int = 3,
        convert: bool = False,
        image_column: str | None = None,
        label_column: str | None = None,
        classes: list[str] | None = None,
        val_fraction: float = 0.0,
        limit: int | None = None,
        flip: bool = False,
        dequantise: bool = False,
        memory_gb: float = 4.0,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(flip=flip, dequantise=dequantise),
        )
        if channels not in MODE_OF:
            raise UserError(f"data.channels: found {channels}, expected 1 or 3")
        for key, value in (("image_size", image_size), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"data.{key}: found {value}, expected at least 1")
        self.name, self.data_dir, self.image_size, self.channels, self.convert = (
            name,
            data_dir,
            image_size,
            channels,
            convert,
        )
        self.image_column, self.label_column, self.classes = image_column, label_column, classes
        self.val_fraction, self.limit, self.memory_gb = val_fraction, limit, memory_gb

    def prepare_data(self) -> None:
        """Downloads and converts once, in one process."""
        self.sources(download=True)

    def sources(self, *, download: bool = False) -> dict[str, Source]:
        """The splits of the data set as they lie on disk."""
        if self.name.startswith(TORCHVISION):
            root = find_folder("torchvision", self.data_dir) or find_folder("", None)
            if root is None:
                raise UserError(
                    f"data.data_dir: '{self.name}' needs a folder; set data.data_dir=FOLDER or PENSTOCK_DATA"
                )
            return open_torchvision(self.name.removeprefix(TORCHVISION), root, download=download)
        short = self.name.split("/")[-1]
        folder = find_folder(short, self.data_dir)
        if folder is None and "/" not in self.name:
            raise UserError(
                f"data.data_dir: no folder for '{self.name}' (looked for $PENSTOCK_DATA/{short}); set "
                "data.data_dir=FOLDER or PENSTOCK_DATA, or give a hub id 'owner/set' as data.name"
            )
        if folder is None or any(folder.rglob("*.parquet")):
            return open_tables(self.name, folder, self.image_column, self.label_column)
        return open_tree(folder)

    def build(self) -> tuple[ImageStore, dict[str, np.ndarray]]:
        sources = self.sources()
        first = dict(zip(sources, np.cumsum([0, *map(len, sources.values())])))
        numbers = {s: first[s] + np.arange(len(sources[s])) if s in sources else np.arange(0) for s in SPLIT_ORDER}
        labels, names = self._labels(sources)
        if self.classes is not None:
            labels, names, numbers = self._only(labels, names, numbers)
        if self.val_fraction:
            if len(numbers["val"]):
                raise UserError(f"data.val_fraction: '{self.name}' has a validation split of its own; expected 0")
            kept, held = held_out(len(numbers["train"]), self.val_fraction)
            numbers["train"], numbers["val"] = numbers["train"][kept], numbers["train"][held]
        if self.limit is not None:
            numbers = {s: _spaced(n, self.limit) for s, n in numbers.items()}
        if not len(numbers["train"]):
            raise UserError(f"{self.name}: the training split is empty")
        self.shape, self.num_classes, self.class_names = self._shape(sources["train"]), len(names), names
        self.fingerprint = fingerprint(
            "images",
            *(source.content() for source in sources.values()),
            *numbers.values(),
            labels,
            (names, self.shape, self.image_size, self.convert, self.pixels),
        )
        wanted = sum(map(len, numbers.values())) * int(np.prod(self.shape))
        store = ImageStore(
            list(sources.values()),
            labels,
            self.shape,
            fit=self.image_size is not None,
            convert=self.convert,
            in_memory=wanted <= self.memory_gb * 1e9,
        )
        return store, numbers

    def _shape(self, source: Source) -> tuple[int, int, int]:
        if self.image_size is not None:
            return self.channels, self.image_size, self.image_size
        image = load_image(source, 0)
        return self.channels, image.height, image.width

    def _labels(self, sources: dict[str, Source]) -> tuple[np.ndarray | None, list[str]]:
        names = sources["train"].class_names
        if any(source.labels is None for source in sources.values()):
            return None, []
        for split, source in sources.items():
            if source.class_names != names:
                raise UserError(f"{self.name}: the classes of '{split}' differ from those of 'train'")
        return np.concatenate([source.labels for source in sources.values()]), names

    def _only(
        self, labels: np.ndarray | None, names: list[str], numbers: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
        for name in self.classes:
            if name not in names:
                found = ", ".join(names) or "no labels"
                raise UserError(f"data.classes: no class '{name}'; found {found}{did_you_mean(name, names)}")
        new = np.full(len(names), -1)
        new[[names.index(name) for name in self.classes]] = np.arange(len(self.classes))
        labels = new[labels]
        return labels, list(self.classes), {s: n[labels[n] >= 0] for s, n in numbers.items()}


def _spaced(numbers: np.ndarray, limit: int) -> np.ndarray:
    if len(numbers) <= limit:
        return numbers
    return numbers[np.arange(limit) * len(numbers) // limit]
