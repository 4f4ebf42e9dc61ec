"""The search for Bellman-optimal steps (arXiv 2312.16414) against the method as published: seconds and peak memory.

`python -m penstock.benchmarks.bellman [--device cuda]`; the direct method keeps every state and velocity of the fine
trajectory of all noises and compares all pairs of times, ours adds up inner products of velocity differences, which it
keeps in 4 bits a number where they are many. Two parts: the costs alone, with a trivial velocity, and the whole
search with a DDPM++ of `--width`. On a CPU every measurement is a process of its own.

Memory is told three times: what the search needs beside the network, that is the peak less the weights and less that of
a few network calls with the method's own batch; the peak less the weights; and the whole peak (of CUDA allocations, or
of the process).
"""

import gc
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from math import ceil
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Size, Tensor

from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import clocks, ratio, since
from penstock.kernels.philox import Draws
from penstock.lightning_modules import bellman
from penstock.lightning_modules.flow.bellman import CostSums, Velocity, path_cost, schedules
from penstock.lightning_modules.flow.grids import compressed, uniform
from penstock.lightning_modules.flow.packed import PackedRows
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.rectified_flow import RectifiedFlow

SHAPE = (3, 32, 32)
LENGTHS = (4, 6, 8)
MEASURED = ("seconds", "search", "network", "above weights", "peak")
CALLS = 4  # of the network, for its own peak
PAGE = 2**-8  # MiB


def field(x: Tensor, t: Tensor) -> Tensor:
    """A curved velocity in one pass over the state."""
    return x * torch.cos(3 * t).view(-1, 1, 1, 1)


def direct(velocity: Velocity, x: Tensor, k_max: int) -> Tensor:
    """The cost matrix as published: the trajectory is kept, then `|x_i + (t_j - t_i) v_i - x_j|^2` for all i < j."""
    times = uniform(k_max).tolist()
    states, velocities = x.new_empty(k_max + 1, *x.shape), x.new_empty(k_max, *x.shape)
    states[0] = x
    for i, (t, s) in enumerate(pairwise(times)):
        velocities[i] = velocity(states[i], x.new_full((len(x),), t))
        torch.add(states[i], velocities[i], alpha=s - t, out=states[i + 1])
    costs = torch.zeros(k_max + 1, k_max + 1, dtype=torch.float64, device=x.device)
    for i in range(k_max):
        for j in range(i + 2, k_max + 1):
            miss = torch.add(states[i], velocities[i], alpha=times[j] - times[i]).sub_(states[j])
            costs[i, j] = miss.square_().flatten(1).sum(1).double().mean()
    return costs.cpu()


def ours(velocity: Velocity, x: Tensor, k_max: int, batch: int) -> Tensor:
    """The cost matrix from sums over batches of at most `batch` noises."""
    sums = CostSums(uniform(k_max))
    for part in x.chunk(ceil(len(x) / batch)):
        sums.follow(velocity, part)
    return sums.matrix()


def measure(
    batch: int | None, part: str, device: str, n: int, k_max: int, width: int, seed: int, threads: int | None
) -> dict[str, Any]:
    """Seconds, memory in MiB, and the schedules; `batch` noises at once, or the direct method for None."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    where, velocity = torch.device(device), field
    gc.collect()
    if part == "network":
        flow = RectifiedFlow(NCSNpp(SHAPE, width=width), partial(torch.optim.Adam, lr=1e-3)).eval()
        with torch.no_grad():
            for weight in flow.net.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
        velocity = compressed(flow.net.to(where))
    with torch.no_grad():
        x = Draws(seed, 0, torch.arange(n, device=where)).normal("bellman", SHAPE)
        parts = x.chunk(ceil(n / batch)) if batch else [x]
        search = partial(ours, batch=batch) if batch else direct
        search(velocity, x[:1], 3)
        warm = PackedRows(1, 1, where)
        warm[0] = x.new_ones(1)
        warm.gram()
        before = _reset_peak(where)
        for some in {len(p): p for p in parts}.values():
            for _ in range(CALLS):
                velocity(some, some.new_zeros(len(some)))
        call = _peak(where) - before
        _reset_peak(where)
        start = clocks(where)
        costs = search(velocity, x, k_max)
        found = schedules(costs)
        seconds, cpu_seconds = since(start, clocks(where))
        peak = _peak(where)
    paths = {k: found.path(k) for k in LENGTHS if k <= k_max}
    memory = {"search": max(peak - before - call, PAGE), "network": call, "above weights": peak - before, "peak": peak}
    measured = {"batch": len(parts[0]), "seconds": seconds, "cpu_seconds": cpu_seconds, **memory}
    return {**measured, "paths": paths, "costs": costs.tolist()}


def _peak(device: torch.device) -> float:
    """The peak since the last reset, in MiB: of CUDA allocations, or of this process's resident set."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _status("VmHWM")


def _reset_peak(device: torch.device) -> float:
    """Forgets the peak so far; returns what is in use, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    """A figure of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def alone(*arguments: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def row(part: str, ours: list[dict[str, Any]], direct: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table: medians over the rounds of one batch size and of the direct method."""
    a, b = (torch.tensor(runs[0]["costs"], dtype=torch.float64) for runs in (ours, direct))
    best, paths = schedules(b), ours[0]["paths"]
    middle = {key: [median(run[key] for run in runs) for runs in (ours, direct)] for key in MEASURED}
    seconds, search, network, above, peak = (middle[key] for key in MEASURED)
    return {
        "part": part,
        "noises at once": f"{ours[0]['batch']}, {direct[0]['batch']}",
        "ours, s": seconds[0],
        "direct, s": seconds[1],
        "direct / ours, time": ratio([d["seconds"] for d in direct], [o["seconds"] for o in ours]),
        "CPU time": ratio([d["cpu_seconds"] for d in direct], [o["cpu_seconds"] for o in ours]),
        "beside the network: ours, MiB": search[0],
        "direct, MiB": search[1],
        "direct / ours, beside the network": search[1] / search[0],
        "the network's own: ours, direct, MiB": f"{network[0]:.0f}, {network[1]:.0f}",
        "direct / ours, above the weights": above[1] / max(above[0], PAGE),
        "whole peak: ours, direct, MiB": f"{peak[0]:.0f}, {peak[1]:.0f}",
        "median difference of costs": float(((a - b).abs() / b)[b > 0].median()),
        "same schedules": "yes" if paths == direct[0]["paths"] else "no",
        "most that ours cost above the best": max(path_cost(b, path) / best.cost(k) - 1 for k, path in paths.items()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `bellman.json` and `bellman.md`, or `bellman_cuda` on a GPU."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--n", type=int, default=100, help="noises")
    options.add_argument("--k-max", type=int, default=100)
    options.add_argument("--width", type=int, default=128, help="of the DDPM++; 128 is the CIFAR-10 preset (61.8 M)")
    options.add_argument("--parts", nargs="+", default=["costs", "network"], choices=["costs", "network"])
    options.add_argument("--rounds", type=int, default=3, help="of the costs alone")
    options.add_argument("--network-rounds", type=int, default=1, help="of the whole search")
    options.add_argument("--batches", type=int, nargs="+", help="noises at once; what the search takes by default")
    given = options.parse_args(argv)
    cuda = given.device == "cuda"
    batches = given.batches or [bellman.batch_size(Size(SHAPE).numel(), given.k_max, torch.device(given.device))]
    rows, values = [], {}
    for part in given.parts:
        runs: dict[int | None, list[dict[str, Any]]] = {batch: [] for batch in [*batches, None]}
        for turn in range(given.rounds if part == "costs" else given.network_rounds):
            for batch in list(runs)[:: -1 if turn % 2 else 1]:
                own = (batch, part, given.device, given.n, given.k_max, given.width, given.seed, given.threads)
                runs[batch].append(measure(*own) if cuda else alone(*own))
        what = "costs alone" if part == "costs" else f"whole search, DDPM++ of width {given.width}"
        rows += [row(what, runs[batch], runs[None]) for batch in batches]
        values[part] = [{k: v for k, v in run.items() if k != "costs"} for done in runs.values() for run in done]
    title = f"Search of Bellman steps against the direct method, K_max = {given.k_max}, N = {given.n}, 3x32x32, "
    title += "GPU" if cuda else "CPU"
    write("bellman_cuda" if cuda else "bellman", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
