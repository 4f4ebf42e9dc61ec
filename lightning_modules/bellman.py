"""Bellman-optimal schedules (arXiv 2312.16414) of trained flows: searched once per weights, kept beside the run."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from penstock.kernels.philox import Draws
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.checkpoints import fingerprint
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.bellman import CostSums, Schedules, schedules, uniform_indices
from penstock.lightning_modules.flow.grids import karras, uniform
from penstock.lightning_modules.flow.paths import EDM
from penstock.lightning_modules.flow.solvers import RK45, Euler, Solution
from penstock.lightning_modules.steps import Bellman

if TYPE_CHECKING:
    from penstock.lightning_modules.flow_module import FlowModule

MEMORY = {"cpu": 4 * 2**20}  # bytes of one batch's velocity differences; elsewhere 20 MiB
FOLDER = "bellman"
_known: WeakKeyDictionary[nn.Module, tuple[tuple[float, ...], dict[Any, Schedules]]] = WeakKeyDictionary()


def schedule(
    checkpoint: Path | str,
    k: int,
    *,
    k_max: int = 100,
    n: int = 100,
    seed: int = 0,
    guidance: float | None = None,
    device: torch.device | str = "cpu",
    uniform: bool = False,
) -> list[int]:
    """The K + 1 indices, into the fine grid of K_max steps, of a checkpoint's best schedule of K steps.

    The averaged weights are searched. Costs are read from the run's folder, or worked out and written there.

    Args:
        checkpoint: written by this program, of a `FlowModule`.
        k: number of steps.
        k_max: steps of the fine grid.
        n: noises that the costs are averaged over.
        seed: of these noises.
        guidance: guidance scale instead of the module's own.
        device: where the network runs.
        uniform: equal steps rounded to the fine grid instead; nothing is searched or read.

    Raises:
        UserError: k outside of 1 to k_max, a checkpoint that can't be used, or a kept file that does not belong to it.
    """
    if not 1 <= k <= k_max:
        raise UserError(f"steps: found K={k}, expected 1 to {k_max}, the steps of the fine grid")
    if uniform:
        return uniform_indices(k, k_max)
    return search(checkpoint, k_max=k_max, n=n, seed=seed, guidance=guidance, device=device).path(k)


def search(
    checkpoint: Path | str,
    *,
    k_max: int = 100,
    n: int = 100,
    seed: int = 0,
    guidance: float | None = None,
    device: torch.device | str = "cpu",
) -> Schedules:
    """The best schedules of a checkpoint; see `schedule`."""
    module = model_from_checkpoint(Path(checkpoint)).to(device)
    return schedules_of(module, k_max=k_max, n=n, seed=seed, guidance=guidance, folder=folder_of(checkpoint))


def folder_of(checkpoint: Path | str) -> Path:
    """Where the costs of a checkpoint are kept: `bellman/` in its run folder, or beside a file that lies elsewhere."""
    parent = Path(checkpoint).resolve().parent
    return (parent.parent if parent.name == "checkpoints" else parent) / FOLDER


def sampling_grid(
    module: "FlowModule", steps: Bellman, guidance: float | None = None, folder: Path | None = None
) -> Tensor:
    """The times `(K + 1,)` of a module's best schedule, float64; t = 0 noise, t = 1 data.

    Args:
        module: any flow; its present weights count.
        steps: how many.
        guidance: guidance scale instead of the module's own.
        folder: where costs are kept over runs of the program; None keeps them in memory, until the weights change.

    Raises:
        UserError: the module is no flow, or its solver chooses its own steps.
    """
    found = schedules_of(module, k_max=steps.k_max, guidance=guidance, folder=folder)
    return fine_grid(module, steps.k_max)[found.path(steps.k)]


def fine_grid(module: "FlowModule", k_max: int) -> Tensor:
    """Times that schedules are chosen from: equal steps; on the EDM path arXiv 2206.00364's noise levels, then 0."""
    path = module.path
    return karras(k_max, path, path.sigma_max, path.sigma_min) if isinstance(path, EDM) else uniform(k_max)


def schedules_of(
    module: "FlowModule",
    *,
    k_max: int = 100,
    n: int = 100,
    seed: int = 0,
    guidance: float | None = None,
    folder: Path | None = None,
) -> Schedules:
    """The best schedules of a module's present weights, from memory, from the file in `folder`, or searched.

    Raises:
        UserError: see `sampling_grid` and `read_costs`.
    """
    if not hasattr(module, "integrate"):
        raise UserError(f"steps=bellman: {type(module).__name__} has no velocity to search; expected a flow")
    if isinstance(module.solver, RK45):
        raise UserError("steps=bellman: RK45 chooses its own steps; expected a solver that follows a grid")
    scale = (module.guidance if guidance is None else guidance) if module.num_classes else 1.0
    norms, key = _norms(module.net), (k_max, n, seed, scale)
    if module not in _known or _known[module][0] != norms:
        _known[module] = norms, {}
    known = _known[module][1]
    if key in known:
        return known[key]
    if folder is None:
        costs = measure(module, k_max, n, seed, scale)
    else:
        identity = {"weights": fingerprint(module.net), "k_max": k_max, "n": n, "seed": seed, "guidance": scale}
        identity |= {"eps": module.eps, "path": module.path}
        identity = {name: str(value) for name, value in identity.items()}
        path = folder / f"cost_{hashlib.sha256(repr(identity).encode()).hexdigest()[:12]}.safetensors"
        if path.is_file():
            costs = read_costs(path, identity)
        else:
            costs = measure(module, k_max, n, seed, scale)
            write_costs(path, costs, identity)
    known[key] = schedules(costs)
    return known[key]


def measure(module: "FlowModule", k_max: int, n: int, seed: int, guidance: float) -> Tensor:
    """The cost matrix `(k_max + 1, k_max + 1)` of a module's present weights: `k_max` network calls for `n` noises.

    Noises are Philox draws of (seed, number); a conditional flow gets each class equally often. The batches are as
    large as the memory for their velocities allows, and as equal as can be.
    """
    module_dtype = next(module.parameters()).dtype
    dtype = torch.float64 if module_dtype == torch.float64 else torch.float32
    index = torch.arange(n, device=module.device)
    batch = batch_size(torch.Size(module.net.shape).numel(), k_max, module.device)
    recorder = _Recorder()
    grid = fine_grid(module, k_max)
    with torch.no_grad(), _evaluated(module):
        for part in index.chunk(ceil(n / batch)):
            x0 = Draws(seed, 0, part).normal("bellman", tuple(module.net.shape), dtype) * module.path.source_std
            cond = part % module.num_classes if module.num_classes else None
            module.integrate(x0, grid=grid, cond=cond, guidance=guidance, solver=recorder)
    try:
        return recorder.sums[0].matrix()
    except ValueError as error:
        raise UserError(f"steps=bellman: {error}") from error


def batch_size(dimensions: int, k_max: int, device: torch.device) -> int:
    """How many noises are followed at once: their velocity differences, in 4 bits a number, fit into 20 MiB.

    That is 136 noises of CIFAR-10's shape on 100 steps, and one where a single noise takes more. On a CPU, which larger
    batches make no faster, it is 4 MiB: the network's own memory is most of what is saved.
    """
    return max(1, 2 * MEMORY.get(device.type, 20 * 2**20) // (k_max * dimensions))


@dataclass(frozen=True)
class _Recorder(Euler):
    """Euler's method that keeps sums of costs instead of states, at the times and with the velocity of the sampler."""

    sums: list[CostSums] = field(default_factory=list)

    def __call__(self, velocity, x, grid, **_):
        if not self.sums:
            self.sums.append(CostSums(grid))
        return Solution(self.sums[0].follow(velocity, x), len(grid) - 1)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True


@torch.no_grad()
def _norms(net: nn.Module) -> tuple[float, ...]:
    """Norm of every tensor of weights: tells in one pass whether they have changed since the last search."""
    own = [p.to_local() if isinstance(p, DTensor) else p for p in net.parameters()]
    return tuple(torch.stack([p.norm(dtype=torch.float32) for p in own]).tolist()) if own else ()


def write_costs(path: Path, costs: Tensor, identity: dict[str, str]) -> None:
    """Writes a cost matrix and what it belongs to; where that fails (no room, no permission) it warns and goes on."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(save({"costs": costs}, identity | {"checksum": _checksum(costs)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        rank_zero_warn(f"{path}: can't be written ({error.strerror}); the search will be repeated next time")
        with suppress(OSError):
            part.unlink(missing_ok=True)


def read_costs(path: Path, identity: dict[str, str]) -> Tensor:
    """The cost matrix in a file.

    Raises:
        UserError: the file is damaged, or belongs to other weights or settings.
    """
    again = "remove the file to search again"
    try:
        with safe_open(path, "pt") as file:
            found, costs = file.metadata() or {}, file.get_tensor("costs")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or no cost matrix ({error}), expected one of this program; {again}") from None
    for name, expected in identity.items():
        if found.get(name) != expected:
            what = "another checkpoint" if name == "weights" else f"another {name}"
            raise UserError(f"{path}: costs of {what}: found {found.get(name)}, expected {expected}; {again}")
    if costs.shape != (int(identity["k_max"]) + 1,) * 2 or found.get("checksum") != _checksum(costs):
        raise UserError(f"{path}: damaged, the costs found are not those written (checksum); {again}")
    return costs


def _checksum(costs: Tensor) -> str:
    return hashlib.blake2b(costs.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
