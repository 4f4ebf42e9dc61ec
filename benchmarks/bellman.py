"""The search for Bellman-optimal steps (arXiv 2312.16414) against the method as published: seconds and peak memory.

`python -m penstock.benchmarks.bellman`; the direct method keeps every state and velocity of the fine trajectory of all
noises and compares all pairs of times, ours follows the noises in batches and adds up inner products of velocity
differences. Two parts: the costs alone, with a velocity that costs nothing to speak of, and the whole search with a
DDPM++ of `--width`. Every measurement is a process of its own.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from penstock.benchmarks.report import parser, write
from penstock.kernels.philox import Draws
from penstock.lightning_modules import bellman
from penstock.lightning_modules.flow.bellman import CostSums, Velocity, schedules
from penstock.lightning_modules.flow.grids import compressed, uniform
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.rectified_flow import RectifiedFlow

SHAPE = (3, 32, 32)
LENGTHS = (4, 6, 8)


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
    costs = torch.zeros(k_max + 1, k_max + 1, dtype=torch.float64)
    for i in range(k_max):
        for j in range(i + 2, k_max + 1):
            miss = torch.add(states[i], velocities[i], alpha=times[j] - times[i]).sub_(states[j])
            costs[i, j] = miss.square_().flatten(1).sum(1).double().mean()
    return costs


def ours(velocity: Velocity, x: Tensor, k_max: int) -> Tensor:
    """The cost matrix from sums over batches as large as in `penstock.lightning_modules.bellman`."""
    sums = CostSums(uniform(k_max))
    for part in x.split(bellman.batch_size(x[0].numel(), k_max, x.device)):
        sums.follow(velocity, part)
    return sums.matrix()


def measure(method: str, part: str, n: int, k_max: int, width: int, seed: int, threads: int | None) -> dict[str, Any]:
    """Seconds, peak memory above that before the search, and the schedules; to be called in a new process."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    velocity = field
    if part == "network":
        flow = RectifiedFlow(NCSNpp(SHAPE, width=width), partial(torch.optim.Adam, lr=1e-3)).eval()
        with torch.no_grad():
            for weight in flow.net.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.02)
        velocity = compressed(flow.net)
    with torch.no_grad():
        x = Draws(seed, 0, torch.arange(n)).normal("bellman", SHAPE)
        velocity(x[:1], torch.zeros(1))
        before = _reset_peak()
        start = time.perf_counter()
        costs = {"ours": ours, "direct": direct}[method](velocity, x, k_max)
        found = schedules(costs)
        seconds = time.perf_counter() - start
    lengths = [k for k in LENGTHS if k <= k_max]
    paths = {k: found.path(k) for k in lengths}
    return {"seconds": seconds, "peak": (_status("VmHWM") - before) / 2**10, "paths": paths, "costs": costs.tolist()}


def _status(name: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _reset_peak() -> int:
    """Forgets the peak of the memory so far; returns what is in use, in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def alone(*arguments: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `bellman.json` and `bellman.md`."""
    options = parser(__doc__)
    options.add_argument("--n", type=int, default=100, help="noises")
    options.add_argument("--k-max", type=int, default=100)
    options.add_argument("--width", type=int, default=128, help="of the DDPM++; 128 is the CIFAR-10 preset (61.8 M)")
    options.add_argument("--parts", nargs="+", default=["costs", "network"], choices=["costs", "network"])
    options.add_argument("--rounds", type=int, default=3, help="of the costs alone; the network runs once")
    given = options.parse_args(argv)
    rows, values = [], {}
    for part in given.parts:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "direct": []}
        for _ in range(given.rounds if part == "costs" else 1):
            for method, done in runs.items():
                done.append(alone(method, part, given.n, given.k_max, given.width, given.seed, given.threads))
        a, b = (torch.tensor(runs[method][0].pop("costs"), dtype=torch.float64) for method in runs)
        far = torch.ones_like(a, dtype=torch.bool).triu(given.k_max // 10 + 1)
        seconds = {method: median(run["seconds"] for run in done) for method, done in runs.items()}
        peak = {method: median(run["peak"] for run in done) for method, done in runs.items()}
        what = "costs alone" if part == "costs" else f"whole search, DDPM++ of width {given.width}"
        rows.append(
            {
                "part": what,
                "ours, s": seconds["ours"],
                "direct, s": seconds["direct"],
                "direct / ours, time": seconds["direct"] / seconds["ours"],
                "ours, MiB": peak["ours"],
                "direct, MiB": peak["direct"],
                "direct / ours, memory": peak["direct"] / peak["ours"],
                "largest difference of costs": float(((a - b).abs() / b)[far].max()),
                "same schedules": "yes" if runs["ours"][0]["paths"] == runs["direct"][0]["paths"] else "no",
            }
        )
        values[part] = {method: [{k: v for k, v in r.items() if k != "costs"} for r in runs[method]] for method in runs}
    title = f"Search of Bellman steps against the direct method, K_max = {given.k_max}, N = {given.n}, 3x32x32, CPU"
    write("bellman", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
