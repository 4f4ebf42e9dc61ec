"""The keyed generator against `torch.randn`: numbers a second, and the share of the memory bandwidth on a GPU.

`python -m penstock.benchmarks.philox` (reference on the CPU), `... --device cuda` (Triton kernel).
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, ratio
from penstock.kernels.dispatch import use_triton
from penstock.kernels.philox import Draws

SHAPES = {
    "digits, batch 128": (128, 1, 8, 8),
    "CIFAR-10, batch 128": (128, 3, 32, 32),
    "256 px, batch 64": (64, 3, 256, 256),
}


def bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second that a plain fill writes: what any generator of numbers is bounded by."""
    buffer = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    taken = alternate({"fill": partial(_repeat, 5, lambda: buffer.fill_(1.0))}, rounds, device)["fill"]
    return 5 * buffer.numel() * buffer.element_size() / median(taken)


def _repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `philox_<device>.json` and `philox_<device>.md`."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--rounds", type=int, default=20)
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    limit = bandwidth(device, given.rounds)
    rows = []
    for name, shape in SHAPES.items():
        draws = Draws(given.seed, 0, torch.arange(shape[0], device=device))
        count = draws.index.numel() * torch.Size(shape[1:]).numel()
        times = max(1, (2**22 if device.type == "cpu" else 2**28) // count // 4)
        times = min(times, 200)
        rivals = {
            "philox": partial(_repeat, times, partial(draws.normal, "noise", shape[1:])),
            "randn": partial(_repeat, times, partial(torch.randn, shape, device=device)),
        }
        taken = alternate(rivals, given.rounds, device)
        philox, randn = (count * times / median(taken[key]) for key in ("philox", "randn"))
        rows.append(
            {
                "normal numbers": name,
                "kernel": "Triton" if use_triton(draws.index) else "reference",
                "philox, 1e9/s": philox / 1e9,
                "torch.randn, 1e9/s": randn / 1e9,
                "time against torch.randn": ratio(taken["philox"], taken["randn"]),
                "microseconds a draw": 1e6 * median(taken["philox"]) / times,
                "share of memory bandwidth": f"{4 * philox / limit:.0%}",
            }
        )
    values = {"bandwidth_gb_per_second": limit / 1e9}
    title = f"Philox draws against torch.randn on {given.device} (float32; a fill writes {limit / 1e9:.0f} GB/s)"
    write(f"philox_{given.device}", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
