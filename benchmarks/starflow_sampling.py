"""Sampling a trained video flow: block Jacobi beside token by token, from the same noise and weights.

`python -m penstock.benchmarks.starflow_sampling CHECKPOINT --threads 2` writes network calls (all blocks, one after the
other), seconds, and how far the noisy clips are from those made token by token. The checkpoint is one of
`penstock fit experiment=starflow_v_moving_digits`.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.benchmarks.report import parser, write
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.flow.inverse import Inverse, Jacobi
from penstock.lightning_modules.flow.inverse import Sequential as TokenByToken
from penstock.lightning_modules.starflow_v import STARFlowV

MOST = 1000


def ways(frame: int, tolerance: float) -> dict[str, Inverse]:
    """What is compared, by name; chunks are frames after the first one, which is a chunk of its own."""
    found: dict[str, Inverse] = {"token by token": TokenByToken()}
    for frames in (1, 4, 16):
        for start in ("noise", "zeros", "frame"):
            name = f"chunks of {frames} {'frame' if frames == 1 else 'frames'}, from {start}"
            found[name] = Jacobi(frame, frames * frame, tolerance, MOST, start)
    return found


@torch.inference_mode()
def made(model: STARFlowV, how: Inverse, z: Tensor, cond: Tensor | None) -> tuple[Tensor, int, float]:
    """Noisy clips of noise `z`, calls and seconds."""
    model.inverse = how
    start = time.perf_counter()
    x = model.inverted(z, None, cond, None)
    return x, model.nfe, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Samples, measures and writes `starflow_sampling.json`, `starflow_sampling.md`."""
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--n", type=int, default=16, help="clips")
    options.add_argument("--prompt", default="a three moves left")
    options.add_argument("--tolerance", type=float, default=1e-8, help="of Jacobi, on squared values")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    model = model_from_checkpoint(given.checkpoint).eval()
    grid = model.net.tokens(torch.zeros(1, *model.net.shape))[1]
    z = torch.randn(given.n, *model.net.shape, generator=torch.Generator().manual_seed(given.seed))
    cond = model.asked(given.n, None, given.prompt)
    compared = ways(grid[1] * grid[2], given.tolerance)
    made(model, next(iter(compared.values())), z[:1], cond[:1])
    rows: list[dict[str, Any]] = []
    exact, calls, seconds = z, 0, 0.0
    for name, how in compared.items():
        x, own, took = made(model, how, z, cond)
        if not rows:
            exact, calls, seconds = x, own, took
        rows.append(
            {
                "inverse": name,
                "calls": own,
                "fewer": f"{calls / own:.1f}x",
                "seconds": f"{took:.2f}",
                "faster": f"{seconds / took:.2f}x",
                "largest difference": f"{float((x - exact).abs().max()):.1e}",
            }
        )
    title = "Sampling moving digits: block Jacobi beside token by token"
    settings = {"n": given.n, "tolerance": given.tolerance, "prompt": given.prompt, "shape": list(model.net.shape)}
    write("starflow_sampling", settings, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
