"""Folders of pairs as the official repositories write them, to be turned into one of ours (see `pairs`).

- Rectified flow (arXiv 2209.03003): `<folder>/<seed>/z0.npy` and `z1.npy`, noise and sample, each `(n, C, H, W)`.
- BOSS (arXiv 2312.16414): `<folder>/<seed>/z0.npy`, `z1.npy`, `t0.npy`, `t1.npy`, the ends of the K segments of each
  trajectory and their times, segment after segment: `K n` rows. There is such a folder for each K.
- 2-rectified flow++ (arXiv 2405.20320): `samples.zip` or `samples/` with 8-bit PNG; `z.zip` or `zs/` with the 32 bytes
  of each image's noise (see `datamodules.noise_store`), of the same name with `.bin`; where there are classes
  `images_labels.csv`, lines `name.png,label`. Its time runs the other way; ours is t = 0 noise, t = 1 data.

Numbers are taken over as they are, 8-bit images as `x / 127.5 - 1`.
"""

import csv
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from penstock.datamodules.noise_store import BYTES, regenerate
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.pairs import VERSION, Recipe

FINEST = 1000
BLOCK = 2**22  # numbers looked at together


class Layout(Protocol):
    """What is read of an official folder: `n` pairs of `shape`, states at `keep` of `steps` (see `pairs.Recipe`)."""

    n: int
    shape: tuple[int, ...]
    steps: int
    keep: tuple[int, ...] | None

    def rows(self, rows: range) -> dict[str, Tensor]: ...


class OfficialPairs:
    """Stands in for a `PairMaker` in `pairs.write_pairs`: its pairs are read, not made.

    Args:
        folder: As an official repository wrote it.
        shard: Pairs of one file of ours.

    Raises:
        UserError: another layout; files that are missing, cannot be read, or do not fit each other.
    """

    def __init__(self, folder: str | Path, shard: int = 1000):
        self.teacher = Path(folder)
        self.layout = _layout(self.teacher)
        self.shape = self.layout.shape
        batch = {"batch": shard, "shard": shard}
        self.recipe = Recipe(self.layout.n, self.layout.steps, keep=self.layout.keep, **batch)

    def identity(self) -> dict[str, Any]:
        """What the pairs depend on: the names and sizes of the files."""
        files = sorted((str(p.relative_to(self.teacher)), p.stat().st_size) for p in self.teacher.rglob("*.*"))
        own = {"version": VERSION, "official": hashlib.sha256(repr(files).encode()).hexdigest(), "key": "image"}
        return own | self.recipe.described()

    def batches(self, rows: range) -> Iterator[dict[str, Tensor]]:
        """The pairs of `rows`."""
        yield self.layout.rows(rows)


def _layout(folder: Path) -> Layout:
    if not folder.is_dir():
        raise UserError(f"from={folder}: no such folder")
    if any((folder / name).exists() for name in ("z.zip", "zs", "samples.zip")):
        return Pictures(folder)
    seeds = [folder] if (folder / "z0.npy").exists() else sorted(p for p in folder.iterdir() if p.is_dir())
    if not seeds or not any((seed / "z0.npy").exists() for seed in seeds):
        raise UserError(f"from={folder}: no <seed>/z0.npy and no z.zip there; expected a folder of official pairs")
    return Arrays(seeds)


class Arrays:
    """Pairs of rectified flow, or segments of BOSS, in `.npy` files.

    Args:
        seeds: Folders of one seed each; their pairs follow one another.
    """

    def __init__(self, seeds: list[Path]):
        self.parts = [_Seed(seed) for seed in seeds]
        first = self.parts[0]
        for part in self.parts:
            if (part.shape, part.times) != (first.shape, first.times):
                raise UserError(
                    f"pairs '{part.folder}': samples {part.shape} at the times {part.times}, expected "
                    f"{first.shape} at {first.times}, as in '{first.folder}'"
                )
        self.shape, self.n = first.shape, sum(part.n for part in self.parts)
        self.steps, self.keep = 1, None
        if len(first.times) > 2:
            self.steps, self.keep = _indices(first)

    def rows(self, rows: range) -> dict[str, Tensor]:
        """Pairs `rows` over all seeds: `source` and `image`, or `states`."""
        found, start = [], 0
        for part in self.parts:
            low, high = max(rows.start - start, 0), min(rows.stop - start, part.n)
            if low < high:
                found.append(part.states(low, high))
            start += part.n
        states = torch.from_numpy(np.concatenate(found).astype(np.float32))
        return {"states": states} if self.keep else {"source": states[:, 0].clone(), "image": states[:, 1].clone()}


class _Seed:
    """The arrays of one seed: `n` trajectories with states `(n, K + 1, *shape)` at `times`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.z0, self.z1 = self._read("z0"), self._read("z1")
        for name, values in (("z0", self.z0), ("z1", self.z1)):
            self._check_finite(name, values)
        if self.z0.shape != self.z1.shape:
            raise UserError(f"pairs '{folder}': z0.npy is {self.z0.shape}, z1.npy {self.z1.shape}, expected the same")
        if self.z0.ndim < 2 or not self.z0.size:
            raise UserError(f"pairs '{folder}': z0.npy is {self.z0.shape}, expected samples (n, C, H, W)")
        self.shape, self.times = tuple(self.z0.shape[1:]), [0.0, 1.0]
        if (folder / "t0.npy").exists():
            self.times = self._times()
        self.n = len(self.z0) // (len(self.times) - 1)

    def _read(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            found = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise UserError(f"pairs '{self.folder}': {name}.npy is missing; expected z0.npy and z1.npy") from None
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"pairs '{path}': can't be read as an array ({type(error).__name__})") from None
        kind = found.dtype if isinstance(found, np.ndarray) else "an archive of arrays"
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
            raise UserError(f"pairs '{path}': found {kind}, expected an array of numbers, such as float32")
        return found

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        """Raises UserError for numbers that are none in float32, which we store."""
        rows = max(1, BLOCK // max(1, values[:1].size)) if values.ndim else 1
        for first in range(0, len(values) if values.ndim else 0, rows):
            with np.errstate(over="ignore"):
                good = np.isfinite(values[first : first + rows].astype(np.float32, copy=False))
            if not good.all():
                row = first + int(np.argwhere(~good)[0][0])
                path = self.folder / f"{name}.npy"
                raise UserError(f"pairs '{path}': NaN or infinite in row {row}, expected finite float32 numbers")

    def _times(self) -> list[float]:
        """Times of the states, from 0 to 1, of segments that follow one another."""
        t0, t1 = self._read("t0"), self._read("t1")
        for name, values in (("t0", t0), ("t1", t1)):
            self._check_finite(name, values)
        if not t0.shape == t1.shape == self.z0.shape[:1]:
            found = f"t0.npy is {t0.shape}, t1.npy {t1.shape}"
            raise UserError(f"pairs '{self.folder}': {found}, expected {self.z0.shape[:1]}, one time a row of z0.npy")
        starts = [*np.flatnonzero(np.diff(t0, prepend=np.nan)), len(t0)]
        sizes, k = set(np.diff(starts).tolist()), len(starts) - 1
        times = [float(t0[start]) for start in starts[:-1]] + [float(t1[-1])]
        joined = all((t1[a:b] == end).all() for a, b, end in zip(starts, starts[1:], times[1:]))
        if len(sizes) != 1 or not joined or (times[0], times[-1]) != (0.0, 1.0) or times != sorted(times):
            raise UserError(
                f"pairs '{self.folder}': {k} segments of {sorted(sizes)} rows at the times {times}, expected "
                f"segments of as many rows each that follow one another from 0 to 1"
            )
        n = sizes.pop()
        if any((self.z1[r * n : (r + 1) * n] != self.z0[(r + 1) * n : (r + 2) * n]).any() for r in range(k - 1)):
            raise UserError(f"pairs '{self.folder}': z1.npy does not go on as z0.npy in the next segment, as expected")
        return times

    def states(self, low: int, high: int) -> np.ndarray:
        """States `(high - low, K + 1, *shape)` of some trajectories."""
        parts = [self.z0[r * self.n + low : r * self.n + high] for r in range(len(self.times) - 1)]
        return np.stack([*parts, self.z1[len(self.z1) - self.n + low : len(self.z1) - self.n + high]], 1)


def _indices(seed: _Seed) -> tuple[int, tuple[int, ...]]:
    """The number of equal steps on which the times lie, and their places among them."""
    times = np.array(seed.times)
    for steps in range(1, FINEST + 1):
        places = np.round(times * steps)
        if np.abs(times - places / steps).max() < 2e-7:
            return steps, tuple(int(place) for place in places)
    raise UserError(f"pairs '{seed.folder}': times {seed.times}, expected multiples of 1/K_max, K_max up to {FINEST}")


class Pictures:
    """Pairs of 2-rectified flow++.

    Args:
        folder: With images, noise, and labels where there are classes.
    """

    steps, keep = 1, None

    def __init__(self, folder: Path):
        self.folder = folder
        self.images, self.noise = _Files(folder, "samples", ".png"), _Files(folder, "z", ".bin", "zs")
        self.names, made = sorted(self.noise.names), set(self.images.names)
        if self.noise.names != made:
            odd = min(self.noise.names ^ made)
            raise UserError(
                f"pairs '{folder}': {len(made)} images and {len(self.names)} noises, expected one noise an image; "
                f"'{odd}' has no {'image' if odd in self.noise.names else 'noise'}"
            )
        if not made:
            raise UserError(f"pairs '{folder}': no pairs in it")
        for name in self.names:
            if (size := self.noise.size(name)) != BYTES:
                place = self.noise.place(name)
                raise UserError(
                    f"pairs '{place}': found {size} bytes, expected {BYTES} (state and increment of PCG64); "
                    f"take the file from the official store again"
                )
        self.n, self.shape = len(self.names), self._image(self.names[0]).shape

    @cached_property
    def labels(self) -> dict[str, int] | None:
        """Name -> class, or None without classes.

        Raises:
            UserError: a line that is none, or an image without a class.
        """
        path = self.folder / "images_labels.csv"
        if not path.is_file() or not path.stat().st_size:
            return None
        with path.open(newline="") as file:
            try:
                labels = {name.removesuffix(".png"): int(label) for name, label in csv.reader(file)}
            except ValueError as error:
                raise UserError(f"pairs '{path}': {error}; expected lines name.png,label") from None
        if missing := set(self.names) - labels.keys():
            raise UserError(f"pairs '{path}': no label of '{min(missing)}.png'; expected one of each image")
        return labels

    def rows(self, rows: range) -> dict[str, Tensor]:
        """Pairs `rows` in the order of their names: `source`, `image`, `label` where there are classes."""
        names = self.names[rows.start : rows.stop]
        images = np.stack([self._checked(name) for name in names])
        source = torch.stack([regenerate(self.noise.read(name), self.shape) for name in names])
        found = {"source": source, "image": torch.from_numpy(images).float() / 127.5 - 1}
        return found | ({} if self.labels is None else {"label": torch.tensor([self.labels[name] for name in names])})

    def _checked(self, name: str) -> np.ndarray:
        image = self._image(name)
        if image.shape != self.shape:
            raise UserError(f"pairs '{self.folder}': '{name}.png' is {image.shape}, expected {self.shape} as the first")
        return image

    def _image(self, name: str) -> np.ndarray:
        """uint8 `(C, H, W)`."""
        try:
            pixels = np.asarray(Image.open(io.BytesIO(self.images.read(name))))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"pairs '{self.folder}': '{name}.png' is no image ({type(error).__name__})") from None
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class _Files:
    """Files of one kind, by name without ending, in `<name>.zip` or in a folder."""

    def __init__(self, folder: Path, name: str, ending: str, plain: str | None = None):
        self.ending, archive, self.root = ending, folder / f"{name}.zip", folder / (plain or name)
        self.archive = None
        if archive.is_file():
            try:
                self.archive = zipfile.ZipFile(archive)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"pairs '{archive}': can't be read as a zip file ({error})") from None
            found = self.archive.namelist()
        elif self.root.is_dir():
            found = [str(p.relative_to(self.root).as_posix()) for p in self.root.rglob(f"*{ending}")]
        else:
            raise UserError(f"pairs '{folder}': neither {archive.name} nor {self.root.name}/ in it")
        self.names = {path.removesuffix(ending) for path in found if path.endswith(ending)}

    def read(self, name: str) -> bytes:
        path = f"{name}{self.ending}"
        try:
            return self.archive.read(path) if self.archive else (self.root / path).read_bytes()
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
            raise UserError(f"pairs '{self.place(name)}': can't be read ({error}); expected a whole file") from None

    def size(self, name: str) -> int:
        """Bytes of one file, without reading it."""
        path = f"{name}{self.ending}"
        return self.archive.getinfo(path).file_size if self.archive else (self.root / path).stat().st_size

    def place(self, name: str) -> Path:
        """Where one file is, below the archive's name where there is an archive."""
        return Path(self.archive.filename if self.archive else self.root) / f"{name}{self.ending}"
