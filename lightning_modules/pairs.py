"""Pairs (noise, sample) that a trained flow makes: on the fly, or sharded to disk and resumable.

A folder of pairs holds

    pairs.json                    what made them: teacher, fingerprint of its weights, recipe, shapes, shards
    shard_000000.safetensors      rows 0 .. shard-1, float32 as the solver left them; then shard_000001 and so on

A shard has `source` `(k, *shape)` at t = 0, the data (`image`, `points` ...) `(k, *shape)` at t = 1, and `label` `(k,)`
of a conditional teacher; where states on the way were asked for, `states` `(k, len(times), *shape)` for both ends.
Row `i` depends on the recipe and `i` alone. A file gets its name when it is complete and on disk, so a killed run goes
on with the shards that are missing, without duplicates or gaps, on any number of ranks.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from penstock.kernels.philox import Draws
from penstock.lightning_modules.build import config_of_checkpoint, model_from_checkpoint
from penstock.lightning_modules.checkpoints import fingerprint
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.solvers import Solver
from penstock.lightning_modules.flow_module import FlowModule
from penstock.lightning_modules.shards import load_manifest, shard_file, write_complete

MANIFEST = "pairs.json"
VERSION = 1


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in value)


ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # of a manifest: what is expected, and whether it is
    **dict.fromkeys(("n", "shard", "steps"), ("a whole number of 1 or more", _count)),
    "key": ("the name of the data", lambda value: isinstance(value, str)),
    "shape": ("a list of whole numbers", _indices),
    "keep": ("null or a list of whole numbers", lambda value: value is None or _indices(value)),
}
ORIGINS = {  # keys of a manifest that say where the pairs are from
    "official": "pairs of an official repository",
    "weights": "pairs that a teacher made of noise",
    "real": "pairs of real data and its noise",
    "source": "pairs that start at a data set",
    "prompts": "pairs made for prompts",
}


@dataclass(frozen=True)
class Recipe:
    """How pairs are made.

    Args:
        n: How many pairs.
        steps: Steps of the solver.
        solver: None is the teacher's own.
        guidance: Scale of classifier-free guidance of the teacher; 1 is none.
        seed: Of the noise, independent of the run's seed.
        batch: Pairs that the teacher makes at once.
        shard: Pairs of one file, a multiple of `batch`.
        keep: Indices 0 .. steps of the states to keep besides both ends' place in `source` and data; None keeps ends.

    Raises:
        ValueError: a number out of range.
    """

    n: int
    steps: int = 20
    solver: Solver | None = None
    guidance: float = 1.0
    seed: int = 0
    batch: int = 250
    shard: int = 1000
    keep: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("n", "steps", "shard", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"pairs: {name}={getattr(self, name)}, expected 1 or more")
        if self.seed < 0:
            raise ValueError(f"pairs: seed={self.seed}, expected 0 or more")
        if self.seed >= 2**64:
            raise ValueError(f"pairs: seed={self.seed}, expected at most {2**64 - 1}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"pairs: guidance={self.guidance}, expected a finite number (1 is none)")
        if self.shard % self.batch:
            raise ValueError(f"pairs: shard={self.shard}, expected a multiple of batch={self.batch}")
        if self.keep is not None:
            kept = list(self.keep)
            if len(kept) < 2 or kept != sorted(set(kept)) or (kept[0], kept[-1]) != (0, self.steps):
                raise ValueError(f"pairs: keep={kept}, expected ascending indices from 0 to steps={self.steps}")

    @property
    def times(self) -> list[float] | None:
        """Times of the kept states, from 0 to 1."""
        return None if self.keep is None else uniform(self.steps)[list(self.keep)].tolist()

    def described(self) -> dict[str, Any]:
        """The recipe in plain values; what does not change a pair (how many, the size of the files) is left out."""
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {key: v for key, v in plain.items() if key not in ("solver", "shard", "n")}


class PairMaker:
    """A teacher that makes pairs: a trained flow with its averaged weights, in eval mode.

    Args:
        teacher: Checkpoint of a flow.
        recipe: How.
        device: Where the teacher runs.

    Raises:
        UserError: the file can't be read, is no flow's, or that flow starts from data where noise is expected.
    """

    source_is_data = False

    def __init__(self, teacher: str | Path, recipe: Recipe, device: torch.device | str = "cpu"):
        model = model_from_checkpoint(Path(teacher))
        if not isinstance(model, FlowModule):
            raise UserError(f"teacher '{teacher}': a {type(model).__name__}, expected a flow that makes samples")
        if starts_from_data(Path(teacher)) != self.source_is_data:
            found, expected = ("noise", "data") if self.source_is_data else ("data", "noise")
            pairs = {"noise": "Pairs", "data": "SourcePairs"}[found]
            raise UserError(
                f"teacher '{teacher}': a flow from {found}, expected one from {expected}; its pairs are made by {pairs}"
            )
        self.model = model.to(device).requires_grad_(False)
        self.teacher, self.recipe = Path(teacher), recipe
        self.weights = fingerprint(model)
        self.key: str = model.key
        self.shape = tuple(model.net.shape)

    def identity(self) -> dict[str, Any]:
        """What the pairs depend on."""
        solver = repr(self.recipe.solver or self.model.solver)
        own = {"version": VERSION, "weights": self.weights, "solver": solver, "key": self.key}
        return own | self.recipe.described()

    def labels(self, index: Tensor) -> Tensor | None:
        """Classes in turn, `index mod num_classes`, or None for an unconditional teacher."""
        return index % self.model.num_classes if self.model.num_classes else None

    def start(self, index: Tensor, draws: Draws) -> Tensor:
        """States `(b, *shape)` at t = 0 of samples `index`: noise."""
        return draws.normal("pairs", self.shape) * self.model.path.source_std

    @torch.no_grad()
    def make(self, index: Tensor, draws: Draws, label: Tensor | None = None) -> dict[str, Tensor]:
        """The pairs of samples `index` `(b,)`, on its device: `source`, the data, `label`, or `states` and `label`."""
        recipe, model = self.recipe, self.model
        label = self.labels(index) if label is None else label
        x = self.start(index, draws)
        options = {"cond": label, "guidance": recipe.guidance, "solver": recipe.solver}
        labelled = {} if label is None else {"label": label}
        if recipe.keep is None:
            return {"source": x, self.key: model.integrate(x, recipe.steps, **options).x, **labelled}
        grid, states = uniform(recipe.steps), [x]
        for start, stop in zip(recipe.keep, recipe.keep[1:]):
            states.append(model.integrate(states[-1], grid=grid[start : stop + 1], **options).x)
        return {"states": torch.stack(states, 1), **labelled}

    def batches(self, rows: range) -> Iterator[dict[str, Tensor]]:
        """The pairs of `rows` on the CPU, made in whole batches: adaptive solvers step for a batch together.

        Raises:
            UserError: the teacher makes numbers that are not finite.
        """
        for first in range(rows.start, rows.stop, self.recipe.batch):
            index = torch.arange(first, first + self.recipe.batch, device=self.model.device)
            made = self.make(index, Draws(self.recipe.seed, 0, index))
            part = {key: value[: rows.stop - first].cpu() for key, value in made.items()}
            for key, value in part.items():
                if not value.isfinite().all():
                    last = first + len(value) - 1
                    raise UserError(
                        f"teacher '{self.teacher}': NaN or infinite numbers in '{key}' of the pairs {first} to {last}, "
                        f"expected finite ones; give another checkpoint, more steps or less guidance"
                    )
            yield part


def starts_from_data(teacher: Path) -> bool:
    """Whether the DataModule that a flow was trained on gives the points that it starts from (`starts`)."""
    data = config_of_checkpoint(teacher).get("data") or {}
    return hasattr(locate(data.get("class_path", "")), "starts")


def write_pairs(
    maker: PairMaker,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    tick: Callable[[int], None] = lambda n: None,
) -> int:
    """Makes what is missing in `folder`; rank r of `world` makes every world-th missing shard.

    Args:
        maker: The teacher and the recipe.
        folder: New, or left by an earlier call with the same maker.
        rank: This process.
        world: Number of processes that call this with the same maker.
        barrier: Waits for all of them.
        tick: Told the number of pairs as they are there (found or made).

    Returns:
        The number of pairs that this process made.

    Raises:
        UserError: the folder holds pairs of another teacher or recipe, or it can't be written (disk full).
    """
    folder = Path(folder)
    new = not folder.exists()
    with _alone(folder) if rank == 0 else nullcontext():
        try:
            return _write(maker, folder, rank, world, barrier, tick)
        finally:
            if new:
                with suppress(OSError):  # it stays where something is in it
                    folder.rmdir()


def _write(
    maker: PairMaker, folder: Path, rank: int, world: int, barrier: Callable[[], None], tick: Callable[[int], None]
) -> int:
    recipe = maker.recipe
    if rank == 0:
        _begin(maker, folder)
    barrier()
    shards = [range(a, min(a + recipe.shard, recipe.n)) for a in range(0, recipe.n, recipe.shard)]
    missing = [n for n, rows in enumerate(shards) if not _complete(shard_file(folder, n), len(rows))]
    tick(sum(len(rows) for n, rows in enumerate(shards) if n not in missing))
    recorded = (folder / MANIFEST).exists() and read_manifest(folder)["n"] >= recipe.n
    barrier()
    made = 0
    for number in missing[rank::world]:
        parts = []
        for part in maker.batches(shards[number]):
            parts.append(part)
            made += len(next(iter(part.values())))
            tick(len(next(iter(part.values()))))
        tensors = {k: torch.cat([part[k] for part in parts]).contiguous() for k in parts[0]}
        if not recorded:  # not before there is a shard to write: what can't be made leaves nothing behind
            _record(maker, folder, rank)
            recorded = True
        path = shard_file(folder, number)
        write_complete(path, _part(path, 0), save(tensors), "pairs")
    barrier()
    return made


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of pairs.

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = folder / MANIFEST
    manifest = load_manifest(path, "pairs", "pairs", VERSION)
    for key, (expected, fits) in ENTRIES.items():
        if not fits(manifest.get(key)):
            found = f"{key}={manifest[key]}" if key in manifest else f"no '{key}'"
            raise UserError(f"pairs '{path}': {found}, expected {expected}; make the folder anew with penstock pairs")
    return manifest


def default_folder(maker: PairMaker) -> Path:
    """`<run of the teacher>/pairs/<hash of what the pairs depend on>`."""
    identity = json.dumps(maker.identity(), sort_keys=True).encode()
    run = maker.teacher.resolve().parent
    run = run.parent if run.name == "checkpoints" else run
    return run / "pairs" / hashlib.sha256(identity).hexdigest()[:12]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Runs that want the same pairs at once wait for the one that makes them."""
    path = folder.parent / f".{folder.name}.lock"
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = open(path, "w")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"pairs '{folder}': cannot be written ({error.strerror})") from error
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
        lock.close()  # whoever held it removed the file while this process waited
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _begin(maker: PairMaker, folder: Path) -> None:
    """Checks the manifest that is there, or that the folder can be written."""
    recipe = maker.recipe
    wanted = maker.identity()
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        origins = [[key for key in ORIGINS if key in one] for one in (found, wanted)]
        if origins[0] != origins[1]:
            ours, theirs = (ORIGINS[keys[-1]] if keys else "pairs of unknown origin" for keys in origins)
            raise UserError(f"pairs '{folder}': holds {ours}, expected {theirs}; give another folder")
        if found.get("official") != wanted.get("official"):
            own = f"made of other files ('{found.get('teacher')}')"
            raise UserError(f"pairs '{folder}': {own}, expected those of '{maker.teacher}'; give another folder")
        for key, value in wanted.items():
            if found.get(key) != value:
                what = "the weights of another checkpoint" if key == "weights" else f"{key}={found.get(key)}"
                raise UserError(f"pairs '{folder}': made with {what}, expected {key}={value}; give another folder")
        if found["shard"] != recipe.shard:
            raise UserError(f"pairs '{folder}': shards of {found['shard']}, expected {recipe.shard}")
    elif folder.is_dir() and any(path not in _parts(folder) for path in folder.iterdir()):
        raise UserError(f"pairs '{folder}': not empty and without {MANIFEST}; expected a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in _parts(folder):
            part.unlink()
    except OSError as error:
        raise UserError(f"pairs '{folder}': cannot be written ({error.strerror}); give another folder") from error


def _record(maker: PairMaker, folder: Path, rank: int) -> None:
    """Writes the manifest; each rank may, before its first shard, and all write the same."""
    recipe = maker.recipe
    manifest = maker.identity() | {
        "n": recipe.n,
        "shard": recipe.shard,
        "shape": list(maker.shape),
        "times": recipe.times,
        "teacher": str(maker.teacher),
    }
    path = folder / MANIFEST
    write_complete(path, _part(path, rank), (json.dumps(manifest, indent=1) + "\n").encode(), "pairs")


def _parts(folder: Path) -> list[Path]:
    """Manifests that a killed run did not complete."""
    return list(folder.glob(f".{MANIFEST}*.part"))


def _complete(path: Path, rows: int) -> bool:
    """Whether a shard is there and holds at least `rows` rows (a last shard grows when more pairs are asked for)."""
    if not path.exists():
        return False
    return shard_layout(path)["rows"] >= rows


def shard_layout(path: Path) -> dict[str, Any]:
    """Where the tensors of a shard lie: `rows`, and `tensors`: name -> (numpy dtype, shape, offset in the file).

    Raises:
        UserError: a file that is cut short or no shard.
    """
    kinds = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "F16": "<f2"}
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header, start = json.loads(file.read(size)), 8 + size
        header.pop("__metadata__", None)
        end = max(entry["data_offsets"][1] for entry in header.values())
        tensors = {k: (kinds[e["dtype"]], tuple(e["shape"]), start + e["data_offsets"][0]) for k, e in header.items()}
        rows = {shape[0] for _, shape, _ in tensors.values()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise UserError(f"pairs '{path}': not a shard ({type(error).__name__}); delete it, it is made anew") from None
    if len(rows) != 1 or path.stat().st_size != start + end:
        raise UserError(f"pairs '{path}': {path.stat().st_size} bytes, expected {start + end}; delete it")
    return {"rows": rows.pop(), "tensors": tensors}


def _part(path: Path, rank: int = 0) -> Path:
    """What a file is called until it is complete; where all ranks write the same file, each has a name of its own."""
    return path.with_name(f".{path.name}.{rank}.part" if rank else f".{path.name}.part")
