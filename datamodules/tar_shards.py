"""Tar shards as webdataset lays them out: members `<key>.<ending>`, one group a sample.

A shard is indexed once, header by header, and its members are read by their place in the file. So samples have numbers,
and the order of an epoch, the shares of ranks and the point where a run resumes are exact. The package webdataset
streams shards through buffers that shuffle: its samples have no numbers, and a stopped run cannot go on with the same
order. Nothing is unpacked, and names of members are never opened as paths.
"""

import json
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from penstock.datamodules.caption_rows import TEXT_KEYS, caption_texts, entry_of
from penstock.lightning_modules.errors import UserError


@dataclass(frozen=True, order=True)
class Member:
    """A file inside a tar shard; as text `<shard>:<name>`.

    Attributes:
        shard: the tar file.
        name: in it.
        first: its first byte.
        size: number of bytes.
    """

    shard: Path
    name: str
    first: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    @property
    def suffix(self) -> str:
        """Last ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    def read(self) -> bytes:
        """Its content.

        Raises:
            OSError: the shard is gone, or has become shorter.
        """
        with open(self.shard, "rb") as file:
            file.seek(self.first)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"found {len(content)} of {self.size} bytes")
        return content


def opened(place: Path | Member) -> Path | BinaryIO:
    """What Pillow opens: a path, or the content of a member."""
    return BytesIO(place.read()) if isinstance(place, Member) else place


def groups(shard: Path) -> dict[str, dict[str, Member]]:
    """Members by key (the name up to the first dot of its last part), then by ending; hidden ones are left out.

    Raises:
        UserError: the file is broken, compressed or cut short, a name leaves the shard, or comes twice.
    """
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                head, slash, tail = member.name.rpartition("/")
                if not member.isfile() or tail.startswith("."):
                    continue
                if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
                    raise UserError(f"{shard}: member '{member.name}' leaves the shard; expected names within it")
                if member.issparse():
                    raise UserError(f"{shard}: member '{member.name}' is a sparse file; expected plain ones")
                stem, _, ending = tail.partition(".")
                parts = found.setdefault(f"{head}{slash}{stem}", {})
                if parts.setdefault(f".{ending.lower()}", own := _member(shard, member)) is not own:
                    raise UserError(f"{shard}: member '{member.name}' comes twice; expected each name once")
            end = tar.offset
        with open(shard, "rb") as file:
            file.seek(end)
            mark = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard}: cannot be read ({error}); expected a whole, uncompressed tar file") from error
    if mark != bytes(tarfile.BLOCKSIZE):
        what = "cut short" if len(mark) < tarfile.BLOCKSIZE else "broken"
        raise UserError(f"{shard}: {what} at byte {end}; expected a whole, uncompressed tar file")
    return found


def sidecars(
    shard: Path, key: str, parts: dict[str, Member], kind: Literal["image", "video"]
) -> tuple[tuple[str, ...], int | None]:
    """Captions and class of one sample: from `.txt` and `.cls`, or from `.json`.

    Raises:
        UserError: no caption, or one that cannot be read.
    """
    place = f"{shard}:{key}"

    def read(ending: str) -> str:
        return parts[ending].read().decode("utf-8", errors="replace")

    try:
        meta = json.loads(read(".json")) if ".json" in parts else {}
        label = int(read(".cls")) if ".cls" in parts else None
    except ValueError as error:
        raise UserError(f"{place}: its .json or .cls cannot be read ({error})") from None
    if not isinstance(meta, dict):
        raise UserError(f'{place}.json: found a {type(meta).__name__}, expected an object like {{"caption": "a cat"}}')
    label = meta.get("label") if label is None else label
    if ".txt" in parts:
        return caption_texts(read(".txt").strip(), f"{place}.txt"), label
    if not meta:
        raise UserError(f"{place}: {kind} without a caption; found {', '.join(parts)}, expected .txt or .json")
    return caption_texts(entry_of(meta, TEXT_KEYS, f"{place}.json"), f"{place}.json"), label


def _member(shard: Path, member: tarfile.TarInfo) -> Member:
    return Member(shard, member.name, member.offset_data, member.size)
