"""Which videos there are and what is said of them: folders with captions, tar shards, and manifests."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.datamodules.caption_rows import FILE_KEYS, TEXT_KEYS, caption_texts, entry_of, read_rows
from penstock.datamodules.caption_sources import CAPTION_FILES, captions_of
from penstock.datamodules.image_sources import SPLIT_NAMES
from penstock.datamodules.tar_shards import Member, groups, sidecars
from penstock.datamodules.video_readers import FRAME_SUFFIXES, Place, frame_files
from penstock.lightning_modules.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".gif")


@dataclass(frozen=True)
class Scene:
    """A video, or a part of one, and its caption.

    Attributes:
        path: a video file, a still, a folder of frames, or a member of a tar shard.
        text: caption.
        start: seconds from the first frame.
        end: likewise; None = to the end of the video.
        source: another video, of the same form, that this one is made of, frame by frame; None = there is none.
    """

    path: Place
    text: str
    start: float = 0.0
    end: float | None = None
    source: Place | None = None

    @property
    def places(self) -> list[Place]:
        """The video and its source."""
        return [place for place in (self.path, self.source) if place is not None]


def on_disk(scenes: list[Scene]) -> list[Path]:
    """All files that videos lie in, ascending: frames of folders one by one, shards as a whole."""
    files: set[Path] = set()
    for place in {place for scene in scenes for place in scene.places}:
        if isinstance(place, Member):
            files.add(place.shard)
        else:
            files.update(frame_files(place) if place.is_dir() else [place])
    return sorted(files)


def open_folder(folder: Path, captions: str | None) -> dict[str, list[Scene]]:
    """Videos of a folder by split `train`, `val`, `test`; all are `train` where it has no subfolder of that name.

    Args:
        folder: video files (at any depth), folders of frames, and stills (directly in it); or tar shards and no such
            thing beside them.
        captions: name of the captions file; None = `captions.jsonl` and its like, else a `.txt` of the video's name
            beside each video, else the video's name. Shards have their own.

    Raises:
        UserError: no videos, or captions that do not match them.
    """
    present = {s: next((n for n in names if (folder / n).is_dir()), None) for s, names in SPLIT_NAMES.items()}
    if not present["train"]:
        return {"train": _split(folder, captions)}
    return {split: _split(folder / sub, captions) for split, sub in present.items() if sub}


def open_manifest(file: Path, root: Path) -> dict[str, list[Scene]]:
    """Videos that a table names, all as `train`.

    Args:
        file: parquet, JSON lines or CSV with columns `file` and `text`, maybe `start` and `end` in seconds, maybe
            `source`, the file of another video.
        root: folder that the columns `file` and `source` start from.

    Raises:
        UserError: the row at fault.
    """
    if not file.is_file():
        raise UserError(f"data.manifest: no file {file}; expected parquet, .jsonl or .csv with columns file and text")
    scenes = [_scene(row, f"{file} {place}", root) for place, row in _table(file)]
    if not scenes:
        raise UserError(f"{file}: empty; expected a row for each video")
    return {"train": scenes}


def _split(folder: Path, captions: str | None) -> list[Scene]:
    items, shards = list(_items(folder)), [p for p in sorted(folder.rglob("*.tar")) if not p.name.startswith(".")]
    if shards and (items or captions):
        found = f"'{items[0].name}'" if items else f"data.captions={captions}"
        raise UserError(f"{folder}: found {found} beside '{shards[0].name}'; expected tar shards or videos, not both")
    if shards:
        return _of_shards(folder, shards)
    if not items:
        raise UserError(
            f"{folder}: no videos; expected files {' '.join(VIDEO_SUFFIXES)}, folders of frames, stills, or tar shards"
        )
    names = [captions] if captions else CAPTION_FILES
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if captions and file is None:
        raise UserError(f"{folder}: no captions file {captions}")
    if file is None:
        return _beside(folder, items)
    found = captions_of(file, folder, items, "video")
    if twice := next((path for path, texts in found.items() if len(texts) > 1), None):
        raise UserError(f"{file}: found {len(found[twice])} captions of '{twice.name}', expected one for each video")
    if other := next((path for path in found if path not in items), None):
        raise UserError(
            f"{file}: '{other.name}' is no video; expected {' '.join(VIDEO_SUFFIXES)}, or a folder of frames"
        )
    return [Scene(path, found[path][0]) for path in items]


def _of_shards(folder: Path, shards: list[Path]) -> list[Scene]:
    """Samples `<key>.mp4`, `<key>.txt` or `.json`, maybe `<key>.source.mp4`, in the order of shards and members."""
    scenes = []
    for shard in shards:
        for key, parts in groups(shard).items():
            path, source = (
                next((parts[name + end] for end in (*VIDEO_SUFFIXES, *FRAME_SUFFIXES) if name + end in parts), None)
                for name in ("", ".source")
            )
            if path is None:
                raise UserError(
                    f"{shard}:{key}: no video; found {', '.join(parts)}, expected one of {' '.join(VIDEO_SUFFIXES)}"
                )
            texts, _ = sidecars(shard, key, parts, "video")
            if len(texts) > 1:
                raise UserError(f"{shard}:{key}: found {len(texts)} captions, expected one")
            scenes.append(Scene(path, texts[0], source=source))
    if not scenes:
        raise UserError(f"{folder}: the .tar shards hold no samples")
    return scenes


def _items(folder: Path) -> Iterator[Path]:
    """Videos in the order of their names: files, stills directly in `folder`, and folders that hold pictures."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_dir():
            is_video = any(p.suffix.lower() in FRAME_SUFFIXES for p in path.iterdir())
        else:
            is_video = path.suffix.lower() in (*VIDEO_SUFFIXES, *(FRAME_SUFFIXES if path.parent == folder else ()))
        if is_video:
            yield path


def _beside(folder: Path, items: list[Path]) -> list[Scene]:
    """Captions in `.txt` files beside the videos, or no captions at all: the names."""
    names = {path: path.name if path.is_dir() else path.stem for path in items}
    wanted = {path: path.parent / f"{name}.txt" for path, name in names.items()}
    texts = sorted(folder.rglob("*.txt"))
    if not texts:
        return [Scene(path, name) for path, name in names.items()]
    if stray := sorted(set(texts) - set(wanted.values())):
        raise UserError(f"{stray[0]}: no video of this name beside it; expected captions to have the videos' names")
    if without := [path for path in items if not wanted[path].is_file()]:
        more = f" (and {len(without) - 1} more)" if len(without) > 1 else ""
        raise UserError(f"{without[0]}: video without a caption{more}; expected {wanted[without[0]].name} beside it")
    read = {path: file.read_text(encoding="utf-8", errors="replace").strip() for path, file in wanted.items()}
    return [Scene(path, caption_texts(text, str(wanted[path]))[0]) for path, text in read.items()]


def _table(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.suffix.lower() != ".parquet":
        yield from ((f"line {line}", row) for line, row in read_rows(file))
        return
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error}); expected a parquet file") from error
    yield from ((f"row {number}", row) for number, row in enumerate(rows))


def _scene(row: dict[str, Any], place: str, root: Path) -> Scene:
    name = str(entry_of(row, FILE_KEYS, place))
    path = _inside(root, name, place)
    source = _inside(root, str(row["source"]), place) if row.get("source") else None
    texts = caption_texts(entry_of(row, TEXT_KEYS, place), place)
    if len(texts) > 1:
        raise UserError(f"{place}: found {len(texts)} captions of '{name}', expected one")
    start, end = _second(row, "start", place) or 0.0, _second(row, "end", place)
    if end is not None and end <= start:
        raise UserError(f"{place}: found start {start:g} and end {end:g}, expected start before end")
    return Scene(path, texts[0], start, end, source)


def _inside(root: Path, name: str, place: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{place}: path '{name}' leaves the data folder {root}")
    if not path.exists():
        raise UserError(f"{place}: no video '{name}' in {root}")
    return path


def _second(row: dict[str, Any], key: str, place: str) -> float | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{place}: {key} is {value!r}, expected seconds of 0 or more")
    return number
