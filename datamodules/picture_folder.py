"""A folder of pictures to predict on: no splits, no labels, nothing to train."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.datamodules.anomaly import sides
from penstock.datamodules.base import KindDataModule, fingerprint
from penstock.datamodules.image_sources import FileSource
from penstock.datamodules.images import load_image
from penstock.datamodules.pixels import Pixels
from penstock.lightning_modules.errors import UserError


class PictureStore:
    """Files as RGB, resized (bilinear, antialiased), or as they are.

    Args:
        source: the files.
        size: height and width, None as they are; then one is fetched at a time.
        least: height and width that pictures as they are must have.
    """

    def __init__(self, source: FileSource, size: tuple[int, int] | None, least: tuple[int, int] = (1, 1)) -> None:
        self.source, self.size, self.least = source, size, least

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        return {"image": torch.stack([self._decoded(number) for number in numbers])}

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""

    def _decoded(self, number: int) -> Tensor:
        image = load_image(self.source, number).convert("RGB")
        if self.size is not None and image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
        if image.height < self.least[0] or image.width < self.least[1]:
            least, where = "{}x{}".format(*self.least), self.source.where(number)
            raise UserError(
                f"{where}: found {image.height}x{image.width} pixels, expected at least {least} (model.tile)"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class PictureFolder(KindDataModule):
    """Every picture in a folder and the folders below it, sorted by path, `image` `(3, H, W)` in [-1, 1].

    Where the ranks cannot share them evenly the first ones come twice, under the same `index`.

    Args:
        data_dir: the folder.
        image_size: side, or [height, width], to resize to; `None` is what the model says (its `image_size`), and where
            that is None, too, pictures come as they are, one in a batch of a rank, at least as large as its `tile`.
        batch_size: global batch.
        num_workers: worker processes a rank.

    Raises:
        UserError: no folder, no picture in it, or one that cannot be read; it is named.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=None, num_workers=num_workers, seed=None, pixels=Pixels()
        )
        self.data_dir, self.size = Path(data_dir).expanduser(), None if image_size is None else sides(image_size)

    def build(self) -> tuple[PictureStore, dict[str, np.ndarray]]:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        if not self.data_dir.is_dir():
            raise UserError(f"images={self.data_dir}: no such folder; expected one with pictures in it")
        files = sorted(p for p in self.data_dir.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not files:
            raise UserError(f"images={self.data_dir}: no pictures; expected files {' '.join(IMG_EXTENSIONS)}")
        model = self.trainer.lightning_module if self.trainer else None
        size = self.size or getattr(model, "image_size", None)
        _, world = self.ranks
        if size is None:
            self.batch_size = self.eval_batch_size = world
        self.files = FileSource(self.data_dir, files, None, [])
        self.shape, self.class_names = (3, *(size or (0, 0))), []
        self.fingerprint = fingerprint("picture_folder", self.files.content(), size)
        least = (size is None and getattr(model, "tile", None)) or (1, 1)
        none, shared = np.arange(0), np.resize(np.arange(len(files)), -(-len(files) // world) * world)
        return PictureStore(self.files, size, least), {"train": none, "val": none, "test": shared}

    def where(self, number: int) -> str:
        """Path of a picture from the folder."""
        return self.files.files[number].relative_to(self.data_dir).as_posix()
