"""The coupling of FastFlow's steps against the same formula in eager PyTorch and in torch.compile: time and memory.

`python -m penstock.benchmarks.fastflow_kernels` on the CPU, `... --device cuda` for the Triton kernel. The maps are
those of ResNet18 at 256 pixels, batch 8 on the CPU and 32 on a GPU, in both formats of memory, float32. The limit is
the time that a copy takes to move the bytes that have to be read and written.

Two figures of memory: the peak of what one call makes, and what waits for backward beside `u`, which the convolution
that reads it keeps anyway; the second is there once for each step of a flow.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch

from penstock.benchmarks.report import parser, write
from penstock.benchmarks.starflow_kernels import Case, bandwidth, called, row
from penstock.kernels.coupling import couple, reference
from penstock.kernels.dispatch import use_triton

MAPS = ((64, 64), (128, 32), (256, 16))  # channels and side
BATCH = {"cpu": 8, "cuda": 32}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
CLAMP = 2.0


def cases(batch: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward, then forward alone, of every map in both formats."""
    for (channels, side), (name, format), gradients in (
        (m, f, g) for m in MAPS for f in FORMATS.items() for g in (True, False)
    ):
        u, a = (torch.randn(batch, channels, side, side, device=device).to(memory_format=format) for _ in range(2))
        fixed = {"perm": torch.randperm(channels, device=device), "clamp": CLAMP}
        inputs = (u, a, torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device))
        work = f"{'training' if gradients else 'inference'}, {channels} x {side} x {side}, {name}"
        moved = (8 if gradients else 3) * u.nbytes
        yield Case(work, partial(couple, **fixed), inputs, gradients, moved, partial(reference, **fixed))


def peak(work: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors that `work` makes and holds at its worst moment."""
    work()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def waiting(case: Case, work: Callable[..., object]) -> float:
    """MiB that backward keeps beside the first input."""
    inputs, seen = [x.detach().requires_grad_() for x in case.inputs], {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        seen[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = work(*inputs)
    seen.pop(inputs[0].untyped_storage().data_ptr(), None)
    del found
    return sum(x.untyped_storage().nbytes() for x in seen.values()) / 2**20


def memory(case: Case, device: torch.device, compiled: bool) -> dict[str, float | None]:
    """The columns of memory."""
    rivals = {"ours": case.work, "eager": case.eager}
    if compiled:
        rivals["torch.compile"] = torch.compile(case.eager, dynamic=False)
    columns: dict[str, float | None] = {}
    for name in ("ours", "eager", "torch.compile"):
        known = name in rivals
        columns[f"{name}, peak MiB"] = peak(partial(called, case, rivals[name], False), device) if known else None
    for name in ("ours", "eager", "torch.compile"):
        known = name in rivals and case.gradients
        columns[f"{name}, waiting MiB"] = waiting(case, rivals[name]) if known else None
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `fastflow_kernels_<device>.json` and `.md`."""
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
    for case in cases(BATCH[given.device], device):
        torch.compiler.reset()
        found = row(case, device, given.rounds, limit, not given.no_compile)
        found["ours is"] = "Triton" if use_triton(case.inputs[0]) else "in parts"
        del found["as published, ms"]
        rows.append(found | memory(case, device, not given.no_compile))
    title = f"Coupling of FastFlow on {given.device}, batch {BATCH[given.device]} (a copy moves {limit / 1e9:.0f} GB/s)"
    values = {"bandwidth_gb_per_second": limit / 1e9, "batch": BATCH[given.device]}
    write(f"fastflow_kernels_{given.device}", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
