"""Deformable attention at the sizes of PIIP-TSB 1120/896/448: against `grid_sample`, torch.compile, the official op.

`python -m penstock.benchmarks.deformable_attention --device cuda` for the Triton kernel; on the CPU, where ours is
`grid_sample`, too, the figures are those of the reference. Both directions of both units (arXiv 2406.04330), float32,
batch 2; points lie around the cell of their query, two cells away in the root mean square of each axis. The limit is
the time that a copy takes to move the bytes that have to be read and written, each once; pixels that several points
read again come from a cache at best. Two figures of memory: the peak of what one call makes, and what waits for
backward, the three inputs included where they do.

The official operator, CUDA only, is that of Deformable DETR as mmcv holds it, or, where mmcv does not have it, as
Hugging Face's `kernels` fetches it (`kernels-community/deformable-detr`, from the network at the first time). Where
neither does the table says why.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise

import torch
from torch import Tensor

from penstock.benchmarks.fastflow_kernels import peak, waiting
from penstock.benchmarks.report import parser, write
from penstock.benchmarks.starflow_kernels import Case, bandwidth, called, row
from penstock.kernels.deformable_attention import deformable_attention, reference

BRANCHES = (("T", 192, 70), ("S", 384, 56), ("B", 768, 28))  # width and side of the grid, patches of 16 pixels
BATCH, HEADS, POINTS, REACH = 2, 16, 4, 2.0
STEP = 64  # samples that the official operator takes at once

Apply = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


def cases(device: torch.device, official: Apply | None = None) -> Iterator[Case]:
    """Forward and backward, then forward alone, of every direction from a branch to its neighbour."""
    for first, second in pairwise(BRANCHES):
        for (name, width, side), (other, _, grid) in ((first, second), (second, first)):
            shapes = [(grid, grid)]
            size = width // 2 // HEADS
            value = torch.randn(BATCH, grid * grid, HEADS, size, device=device)
            centers = (torch.arange(side, device=device) + 0.5) / side
            cells = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), -1).view(1, -1, 1, 1, 1, 2)
            far = torch.randn(BATCH, side * side, HEADS, 1, POINTS, 2, device=device)
            inputs = value, cells + REACH * far / grid, torch.rand(far.shape[:-1], device=device).softmax(-1)
            read, made = sum(x.nbytes for x in inputs), 4 * BATCH * side * side * HEADS * size
            published = None
            if official is not None:
                tables = torch.tensor(shapes, device=device), torch.zeros(1, dtype=torch.int64, device=device)
                published = partial(_published, official, tables)
            for gradients in (True, False):
                work = f"{'training' if gradients else 'inference'}, {name} {side} x {side} of {other} {grid} x {grid}"
                moved = 3 * read + 2 * made if gradients else read + made
                ours, eager = (partial(_ordered, function, shapes) for function in (deformable_attention, reference))
                yield Case(f"{work}, d {size}", ours, inputs, gradients, moved, eager, published)


def _ordered(
    function: Callable[..., Tensor], shapes: list[tuple[int, int]], value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    return function(value, shapes, locations, weights)


def _published(
    apply: Apply, tables: tuple[Tensor, Tensor], value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    return apply(value, *tables, locations, weights, STEP)


def official(device: torch.device) -> tuple[Apply | None, str]:
    """The operator and the package that holds it, or None and why there is none."""
    if device.type != "cuda":
        return None, "none: for CUDA only"
    reasons = []
    for package, load in (("mmcv", _of_mmcv), ("kernels", _of_hub)):
        try:
            return load(), f"{package} {version(package)}"
        except Exception as error:  # absent, built without the operator, no network, no build for this PyTorch
            reasons.append(f"{package}: " + (str(error).strip().splitlines() or [type(error).__name__])[0])
    return None, "none: " + "; ".join(reasons)


def _of_mmcv() -> Apply:
    return import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction.apply


def _of_hub() -> Apply:
    hub = import_module("kernels").get_kernel("kernels-community/deformable-detr", version=1)
    return hub.layers.MultiScaleDeformableAttentionFunction.apply


def memory(case: Case, device: torch.device, compiled: bool) -> dict[str, float | None]:
    """The columns of memory; None where there is no rival or nothing waits."""
    rivals = {"ours": case.work, "eager": case.eager, "torch.compile": None, "official op": case.published}
    if compiled:
        rivals["torch.compile"] = torch.compile(case.eager, dynamic=False)
    columns = {
        f"{n}, peak MiB": work and peak(partial(called, case, work, False), device) for n, work in rivals.items()
    }
    for name, work in rivals.items():
        columns[f"{name}, waiting MiB"] = _waiting(case, work) if work and case.gradients else None
    return columns


def _waiting(case: Case, work: Callable[..., Tensor]) -> float:
    """`waiting` leaves the first input out: here one that nobody reads."""
    spare = torch.zeros((), device=case.inputs[0].device)
    return waiting(case._replace(inputs=(spare, *case.inputs)), lambda _, *inputs: work(*inputs))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `deformable_attention_<device>.json` and `.md`."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--no-compile", action="store_true", help="leaves torch.compile out")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    device, rows = torch.device(given.device), []
    limit = bandwidth(device, given.rounds)
    apply, origin = official(device)
    for case in cases(device, apply):
        torch.compiler.reset()
        found = row(case, device, given.rounds, limit, not given.no_compile)
        found = {key.replace("as published", "official op"): value for key, value in found.items()}
        rows.append(found | memory(case, device, not given.no_compile) | {"official op is": origin})
    size = f"batch {BATCH}, {HEADS} heads, {POINTS} points"
    title = f"Deformable attention of PIIP-TSB on {given.device}, {size} (a copy moves {limit / 1e9:.0f} GB/s)"
    values = {"bandwidth_gb_per_second": limit / 1e9, "batch": BATCH}
    write(f"deformable_attention_{given.device}", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
