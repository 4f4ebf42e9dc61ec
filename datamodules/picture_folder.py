"""A folder of pictures to predict on: no splits, no labels, nothing to train."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.datamodules.anomaly import sides
from penstock.datamodules.base import KindDataModule, fingerprint
from penstock.datamodules.image_sources import FileSource
from penstock.datamodules.images import check_depth, load_upright
from penstock.datamodules.pixels import Pixels
from penstock.lightning_modules.errors import UserError


class PictureStore:
    """Files as RGB, upright (see `load_upright`), resized (bilinear, antialiased), or as they are.

    Args:
        source: the files.
        size: height and width, None as they are; then one is fetched at a time.
        least: height and width that pictures as they are must have.
    """

    def __init__(self, source: FileSource, size: tuple[int, int] | None, least: tuple[int, int] = (1, 1)) -> None:
        self.source, self.size, self.least = source, size, least

    def fetch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        images, sizes = [], []
        for number in numbers:
            picture = self.picture(number)
            sizes.append((picture.height, picture.width))
            images.append(_pixels(self._resized(picture)))
        return {"image": torch.stack(images), "original_size": torch.tensor(sizes)}

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""

    def picture(self, number: int) -> Image.Image:
        """One picture as RGB, upright, of its own size.

        Raises:
            UserError: it cannot be read, has more than 8 bits a channel or is too small.
        """
        image, where = load_upright(self.source, number), self.source.where(number)
        check_depth(image, where)
        if self.size is None and (image.height < self.least[0] or image.width < self.least[1]):
            least = "{}x{}".format(*self.least)
            raise UserError(
                f"{where}: found {image.height}x{image.width} pixels, expected at least {least} (model.tile)"
            )
        return image.convert("RGB")

    def _resized(self, picture: Image.Image) -> Image.Image:
        if self.size is None or picture.size == self.size[::-1]:
            return picture
        return picture.resize(self.size[::-1], Image.Resampling.BILINEAR)


class PictureFolder(KindDataModule):
    """Every picture in a folder and the folders below it, sorted by path, or a single one.

    Batches have `image` `(B, 3, H, W)` in [-1, 1], `original_size` int64 `(B, 2)`, height and width of the upright
    picture, and `index`. Where the ranks cannot share pictures evenly the first ones come twice, under one `index`.

    Args:
        data_dir: the folder, or the file of one picture.
        image_size: side, or [height, width], to resize to; `None` is what the model says (its `image_size`), and where
            that is None, too, pictures come as they are, one in a batch of a rank, at least as large as its `tile`.
        batch_size: global batch.
        num_workers: worker processes a rank.

    Raises:
        UserError: no folder, no picture in it, or one that cannot be read or has more than 8 bits a channel; it is
            named.
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
        files = self._found()
        model = self.trainer.lightning_module if self.trainer else None
        size = self.size or getattr(model, "image_size", None)
        _, world = self.ranks
        if size is None:
            self.batch_size = self.eval_batch_size = world
        root = self.data_dir if self.data_dir.is_dir() else self.data_dir.parent
        self.files = FileSource(root, files, None, [])
        self.shape, self.class_names = (3, *(size or (0, 0))), []
        self.fingerprint = fingerprint("picture_folder", self.files.content(), size)
        least = (size is None and getattr(model, "tile", None)) or (1, 1)
        none, shared = np.arange(0), np.resize(np.arange(len(files)), -(-len(files) // world) * world)
        return PictureStore(self.files, size, least), {"train": none, "val": none, "test": shared}

    def where(self, number: int) -> str:
        """Path of a picture from the folder."""
        return self.files.files[number].relative_to(self.files.root).as_posix()

    def original(self, number: int) -> Tensor:
        """A picture at its own size, read once more: `(3, H, W)` in [-1, 1]."""
        return self.pixels.scale(_pixels(self.store.picture(number)))

    def _found(self) -> list[Path]:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        if self.data_dir.is_file():
            return [self.data_dir]
        if not self.data_dir.is_dir():
            raise UserError(
                f"images={self.data_dir}: no such folder or file; expected pictures in a folder, or one picture"
            )
        files = sorted(p for p in self.data_dir.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not files:
            raise UserError(f"images={self.data_dir}: no pictures; expected files {' '.join(IMG_EXTENSIONS)}")
        return files


def _pixels(image: Image.Image) -> Tensor:
    """uint8 `(C, H, W)`."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
