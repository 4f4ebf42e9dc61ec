"""Where images come from: hub sets and parquet folders, trees of image files, torchvision's classes.

Every opener returns splits by the names `train`, `val`, `test`, each a `Source`.
"""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from penstock.lightning_modules.errors import UserError, did_you_mean

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "category", "target")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
HASHED_WHOLE = 256 * 2**20


@contextmanager
def named(where: str) -> Iterator[None]:
    """Reading an image that messages call `where`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where}: cannot read the image ({type(error).__name__}: {error}); expected a complete image"
        ) from error


def turn_upright(image: Image.Image) -> None:
    """Turns an image in its place as the orientation in its EXIF data says; data that cannot be read say nothing."""
    with suppress(SyntaxError):
        ImageOps.exif_transpose(image, in_place=True)


class Source(Protocol):
    """One split: `labels` int64 `(n,)` or None, their names, and images that are opened one by one."""

    labels: np.ndarray | None
    class_names: list[str]

    def __len__(self) -> int: ...

    def where(self, row: int) -> str:
        """Name of one image for messages."""

    def open(self, row: int) -> Image.Image:
        """The image, perhaps not read yet; raises OSError or UserError."""

    def content(self) -> str:
        """What the fingerprint counts."""


class FileSource:
    """Image files; the label is the number of the class folder. `labels` is None for files in one flat folder."""

    def __init__(self, root: Path, files: Sequence[Path], labels: np.ndarray | None, class_names: list[str]) -> None:
        self.root, self.files, self.labels, self.class_names = root, list(files), labels, class_names

    def __len__(self) -> int:
        return len(self.files)

    def where(self, row: int) -> str:
        return str(self.files[row])

    def open(self, row: int) -> Image.Image:
        return Image.open(self.files[row])

    def content(self) -> str:
        return digest_files(self.root, self.files)


class TableSource:
    """Rows of a `datasets.Dataset` with a column of {bytes, path}."""

    def __init__(self, table: Any, place: str, root: Path | None, image_column: str, label_column: str | None) -> None:
        import datasets

        self.place, self.root, self.column = place, root, image_column
        if isinstance(table.features[image_column], datasets.Image):
            table = table.cast_column(image_column, datasets.Image(decode=False))
        self.labels, self.class_names = _labels(table, label_column, place)
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def where(self, row: int) -> str:
        return f"{self.place} row {row}"

    def open(self, row: int) -> Image.Image:
        cell = self.table[int(row)][self.column]
        if isinstance(cell, bytes):
            return Image.open(BytesIO(cell))
        if not isinstance(cell, dict) or not (cell.get("bytes") or cell.get("path")):
            raise UserError(
                f"{self.where(row)}: column '{self.column}' holds {type(cell).__name__}, expected an encoded image"
            )
        if cell.get("bytes"):
            return Image.open(BytesIO(cell["bytes"]))
        return Image.open(self._inside(cell["path"], row))

    def content(self) -> str:
        if self.root is None:
            return self.table._fingerprint
        return digest_files(self.root, sorted(self.root.rglob("*.parquet")))

    def _inside(self, path: str, row: int) -> Path:
        if self.root is None:
            raise UserError(f"{self.where(row)}: holds the path '{path}' and no image bytes")
        file = (self.root / path).resolve()
        if not file.is_relative_to(self.root.resolve()):
            raise UserError(f"{self.where(row)}: path '{path}' leaves the data folder {self.root}")
        return file


class TorchvisionSource:
    """A data set class of torchvision that yields (PIL image, class number)."""

    def __init__(self, dataset: Any, place: str) -> None:
        self.dataset, self.place = dataset, place
        labels = next(
            (getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None
        )
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        count = 0 if self.labels is None else int(self.labels.max()) + 1
        self.class_names = [str(name) for name in getattr(dataset, "classes", range(count))] if count else []

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, row: int) -> str:
        return f"{self.place} image {row}"

    def open(self, row: int) -> Image.Image:
        image = self.dataset[int(row)][0]
        if not isinstance(image, Image.Image):
            raise UserError(f"{self.place}: yields {type(image).__name__}, expected PIL images")
        return image

    def content(self) -> str:
        raw = getattr(self.dataset, "data", None)
        digest = hashlib.sha256(np.ascontiguousarray(raw).tobytes()) if raw is not None else hashlib.sha256()
        return f"{self.place} {len(self)} {digest.hexdigest()}"


def open_tables(
    name: str, folder: Path | None, image_column: str | None, label_column: str | None
) -> dict[str, TableSource]:
    """Splits of the hub set `name`, or of a local `folder` of parquet files in the hub's layout.

    Raises:
        UserError: not found and not downloadable, unreadable, no training split, or an expected column is absent.
    """
    import datasets

    try:
        tables = datasets.load_dataset(str(folder) if folder else name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if folder:
            raise UserError(f"{folder}: cannot read its parquet files ({reason})") from error
        raise UserError(
            f"data.name: cannot get '{name}' from the Hugging Face hub ({reason}); check the id and the connection, or "
            f"copy the set and give its folder as data.data_dir=FOLDER or PENSTOCK_DATA/{name.split('/')[-1]}"
        ) from error
    place = str(folder) if folder else name
    found = {}
    for split, names in SPLIT_NAMES.items():
        if key := next((n for n in names if n in tables), None):
            columns = tables[key].column_names
            image = _column("image_column", image_column, IMAGE_COLUMNS, columns, place)
            if image is None:
                raise UserError(
                    f"{place}: no image column; found {', '.join(columns)}, expected one of "
                    f"{', '.join(IMAGE_COLUMNS)}, or data.image_column=NAME"
                )
            label = _column("label_column", label_column, LABEL_COLUMNS, columns, place)
            found[split] = TableSource(tables[key], f"{place} [{key}]", folder, image, label)
    return _with_train(found, place, list(tables))


def open_tree(folder: Path) -> dict[str, FileSource]:
    """Splits of a folder of images: `class/file` (ImageFolder) or bare files, optionally under train/ val/ test/.

    Raises:
        UserError: no image at all, a class folder without images, or splits with different classes.
    """
    subfolders = sorted(p.name for p in folder.iterdir() if p.is_dir())
    present = {s: next((n for n in names if n in subfolders), None) for s, names in SPLIT_NAMES.items()}
    if not present["train"]:
        return {"train": _tree_split(folder)}
    found = {split: _tree_split(folder / sub) for split, sub in present.items() if sub}
    for split, source in found.items():
        if source.class_names != found["train"].class_names:
            odd = sorted(set(source.class_names) ^ set(found["train"].class_names))
            raise UserError(f"{source.root}: its classes differ from those of train/ in {', '.join(odd[:5])} ({split})")
    return found


def open_torchvision(name: str, root: Path, *, download: bool) -> dict[str, TorchvisionSource]:
    """Splits of the class `torchvision.datasets.<name>` kept in `root`.

    Raises:
        UserError: no such class, a class without train/test splits, or files absent and not downloadable.
    """
    from torchvision import datasets as library

    kind = getattr(library, name, None)
    if name not in library.__all__ or not inspect.isclass(kind):
        raise UserError(f"data.name: torchvision.datasets has no class '{name}'{did_you_mean(name, library.__all__)}")
    options = inspect.signature(kind).parameters
    if "train" in options:
        choices = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in options:
        choices = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
    else:
        raise UserError(f"data.name: torchvision's {name} has no train and test split that could be asked for")
    fetch = {"download": download} if "download" in options else {}
    found = {}
    for split, choice in choices.items():
        try:
            found[split] = TorchvisionSource(kind(str(root), **choice, **fetch), f"torchvision:{name} [{split}]")
        except ValueError:
            if split == "train":
                raise
        except (RuntimeError, OSError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(
                f"data.name: torchvision:{name} is not in {root} and cannot be downloaded ({reason}); copy its files "
                "there or set data.data_dir=FOLDER"
            ) from error
    return found


def _tree_split(folder: Path) -> FileSource:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise UserError(f"{folder}: no images; expected files {' '.join(IMG_EXTENSIONS)} or class folders of them")
        return FileSource(folder, files, None, [])
    numbers = {name: k for k, name in enumerate(classes)}
    samples = make_dataset(folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    labels = np.array([k for _, k in samples], dtype=np.int64)
    for name in classes:
        if not (labels == numbers[name]).any():
            raise UserError(
                f"{folder / name}: class folder without images; expected at least one of {' '.join(IMG_EXTENSIONS)}"
            )
    return FileSource(folder, [Path(p) for p, _ in samples], labels, classes)


def _column(key: str, wanted: str | None, common: Sequence[str], columns: list[str], place: str) -> str | None:
    if wanted is None:
        return next((c for c in common if c in columns), None)
    if wanted not in columns:
        raise UserError(
            f"data.{key}: {place} has no column '{wanted}'; found {', '.join(columns)}{did_you_mean(wanted, columns)}"
        )
    return wanted


def _labels(table: Any, column: str | None, place: str) -> tuple[np.ndarray | None, list[str]]:
    if column is None:
        return None, []
    values = np.asarray(table[column][:])
    if values.dtype.kind in "US":
        names, values = np.unique(values, return_inverse=True)
        return values.astype(np.int64), names.tolist()
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise UserError(f"{place}: column '{column}' holds {values.dtype}, expected class numbers or names")
    names = getattr(table.features[column], "names", None) or [str(k) for k in range(int(values.max()) + 1)]
    if len(values) and not 0 <= values.min() <= values.max() < len(names):
        raise UserError(
            f"{place}: column '{column}' holds {values.min()} .. {values.max()}, expected 0 .. {len(names) - 1}"
        )
    return values.astype(np.int64), list(names)


def _with_train(found: dict[str, Any], place: str, names: list[str]) -> dict[str, Any]:
    if "train" not in found:
        raise UserError(f"{place}: no split called train; found {', '.join(names)}")
    return found


def digest_files(root: Path, files: Sequence[Path]) -> str:
    """Names and sizes, with the content of small sets and the times of change of large ones."""
    stats = [file.stat() for file in files]
    whole = sum(s.st_size for s in stats) <= HASHED_WHOLE
    digest = hashlib.sha256()
    for file, stat in zip(files, stats):
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest() if whole else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()
