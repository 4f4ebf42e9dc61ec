"""Where images with captions come from: folders with a captions file, tar shards, parquet and hub sets.

Every opener returns splits by the names `train`, `val`, `test`, each a `Captioned` source of images. Images are read
one by one by place, whatever holds them, so that any order can be resumed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from penstock.datamodules.caption_rows import FILE_KEYS, TEXT_KEYS, caption_texts, entry_of, read_rows
from penstock.datamodules.image_sources import SPLIT_NAMES, FileSource, Source, open_tables
from penstock.datamodules.tar_shards import Member, groups, opened, sidecars
from penstock.lightning_modules.errors import UserError, did_you_mean

CAPTION_FILES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass
class Captioned:
    """One split: images and, for each, one caption or several."""

    images: Source
    captions: list[tuple[str, ...]]


class TarSource:
    """Images inside tar shards, read by place, see `tar_shards`.

    Args:
        entries: place of each image.
        labels: int64 `(n,)` or None.
        root: folder of the shards.
    """

    def __init__(self, entries: list[Member], labels: np.ndarray | None, root: Path) -> None:
        self.entries, self.labels, self.root = entries, labels, root
        self.class_names = [] if labels is None else [str(k) for k in range(int(labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.entries)

    def where(self, row: int) -> str:
        return str(self.entries[row])

    def open(self, row: int) -> Image.Image:
        return Image.open(opened(self.entries[row]))

    def content(self) -> str:
        digest = hashlib.sha256()
        for path in sorted({entry.shard for entry in self.entries}):
            stat = path.stat()
            digest.update(f"{path.relative_to(self.root)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def open_captioned(
    name: str,
    folder: Path | None,
    captions: str | None,
    image_column: str | None,
    caption_column: str | None,
    label_column: str | None,
) -> dict[str, Captioned]:
    """Splits of a local folder (tar shards, parquet, or image files with a captions file) or of the hub set `name`.

    Raises:
        UserError: the file, row or key at fault.
    """
    if folder is None or any(folder.rglob("*.parquet")):
        tables = open_tables(name, folder, image_column, label_column)
        return {split: Captioned(source, _column(source, caption_column)) for split, source in tables.items()}
    reader = _tar_split if any(folder.rglob("*.tar")) else _file_split
    present = {s: next((n for n in names if (folder / n).is_dir()), None) for s, names in SPLIT_NAMES.items()}
    if not present["train"]:
        return {"train": reader(folder, captions)}
    return {split: reader(folder / sub, captions) for split, sub in present.items() if sub}


def _column(source: Any, wanted: str | None) -> list[tuple[str, ...]]:
    columns = source.table.column_names
    name = wanted or next((c for c in TEXT_KEYS if c in columns), None)
    if name is None or name not in columns:
        expected = f"'{wanted}'" if wanted else f"one of {', '.join(TEXT_KEYS)}, or data.caption_column=NAME"
        near = did_you_mean(wanted, columns) if wanted else ""
        raise UserError(f"{source.place}: no caption column; found {', '.join(columns)}, expected {expected}{near}")
    return [
        caption_texts(value, f"{source.place} row {row}: column '{name}'")
        for row, value in enumerate(source.table[name])
    ]


def _file_split(folder: Path, captions: str | None) -> Captioned:
    file = folder / captions if captions else next((folder / n for n in CAPTION_FILES if (folder / n).is_file()), None)
    if file is None or not file.is_file():
        wanted = captions or " or ".join(CAPTION_FILES[:2])
        raise UserError(f"{folder}: no captions file; expected {wanted} there, or data.captions=NAME")
    images = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    found = captions_of(file, folder, images, "image")
    files = sorted(found)
    return Captioned(FileSource(folder, files, None, []), [found[path] for path in files])


def captions_of(
    file: Path, folder: Path, items: Sequence[Path], kind: Literal["image", "video"]
) -> dict[Path, tuple[str, ...]]:
    """Captions by path, from a captions file; further lines of an item are further captions.

    Args:
        file: JSON lines or CSV.
        folder: that the names in it start from.
        items: all files (or folders) that need a caption.
        kind: word for messages.

    Raises:
        UserError: an empty file, a line that names no such item or leaves the folder, or an item without a line.
    """
    known, found = set(items), {}
    for line, row in read_rows(file):
        place = f"{file} line {line}"
        name = entry_of(row, FILE_KEYS, place)
        path = folder / str(name)
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{place}: path '{name}' leaves the data folder {folder}")
        if path not in known and not path.is_file():
            near = did_you_mean(str(name), [str(item.relative_to(folder)) for item in items])
            raise UserError(f"{place}: no {kind} '{name}' in {folder}{near}")
        found[path] = found.get(path, ()) + caption_texts(entry_of(row, TEXT_KEYS, place), place)
    if not found:
        raise UserError(f"{file}: empty; expected one line for each {kind}")
    if without := [p for p in items if p not in found]:
        more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        raise UserError(f"{without[0]}: {kind} without a caption in {file.name}{more}; expected a line for each {kind}")
    return found


def _tar_split(folder: Path, captions: str | None) -> Captioned:
    entries, texts, labels = [], [], []
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder}: no .tar shards in it")
    for shard in shards:
        for key, parts in groups(shard).items():
            image = next((parts[s] for s in IMAGE_SUFFIXES if s in parts), None)
            if image is None:
                raise UserError(f"{shard}:{key}: no image; found {', '.join(parts)}, expected one of .jpg .png .webp")
            entries.append(image)
            text, label = sidecars(shard, key, parts, "image")
            texts.append(text)
            labels.append(label)
    if not entries:
        raise UserError(f"{folder}: the .tar shards hold no samples")
    known = all(label is not None for label in labels)
    return Captioned(TarSource(entries, np.array(labels, dtype=np.int64) if known else None, folder), texts)
