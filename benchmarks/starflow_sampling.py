"""Sampling a trained video flow: Jacobi in chunks and in a sliding window beside token by token, from the same noise.

`python -m penstock.benchmarks.starflow_sampling CHECKPOINT --threads 2` writes network calls (all blocks, one after the
other), seconds, and how far the noisy clips are from those made token by token in float64; in float32 rounding has its
share in that, token by token as well. The checkpoint is one of `penstock fit experiment=starflow_v_moving_digits`.
"""

import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, ratio
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.flow.inverse import Inverse, Jacobi
from penstock.lightning_modules.flow.inverse import Sequential as TokenByToken
from penstock.lightning_modules.flow.sliding import Sliding
from penstock.lightning_modules.starflow_v import STARFlowV

MOST = 1000
EXACT = "token by token"
Way = tuple[Inverse, Inverse]


class Work(NamedTuple):
    """Noise `(B, T, C, H, W)` and text of clips that are made."""

    z: Tensor
    cond: Tensor | None


def ways(frame: int, tolerance: float, shallow: float) -> dict[str, Way]:
    """What is compared, by name: inverses of the deep block and of the others, each with a tolerance of its own.

    Chunks come after the first frame, which is a chunk of its own.
    """
    found: dict[str, Way] = {EXACT: (TokenByToken(), TokenByToken())}
    for frames in (1, 4, 16):
        local = Jacobi(frame, None, shallow, MOST)
        found[f"chunks of {_frames(frames)}"] = (Jacobi(frame, frames * frame, tolerance, MOST), local)
    for frames in (2, 4, 8, 16):
        found[f"a window of {_frames(frames)}"] = (Sliding(frames * frame, tolerance), Sliding(frame, shallow))
    return found


def _frames(number: int) -> str:
    return f"{number} frame{'s' * (number > 1)}"


@torch.inference_mode()
def made(model: STARFlowV, way: Way, work: Work) -> Tensor:
    """Noisy clips."""
    model.inverse, model.shallow = way
    dtype = next(model.parameters()).dtype
    return model.inverted(work.z.to(dtype), None, None if work.cond is None else work.cond.to(dtype), None)


def rows_of(model: STARFlowV, compared: dict[str, Way], work: Work, rounds: int) -> list[dict[str, Any]]:
    """Lines of the table for some clips: all ways take turns; the same in float64."""
    wide = deepcopy(model).double()
    exact = made(wide, compared[EXACT], work)
    found, calls = {}, {}

    def runner(name: str):
        def run():
            found[name] = made(model, compared[name], work)
            calls[name] = model.nfe

        return run

    taken = alternate({name: runner(name) for name in compared}, rounds, work.z.device)
    rows = []
    for name, way in compared.items():
        clean = exact if name == EXACT else made(wide, way, work)
        rows.append(
            {
                "clips": len(work.z),
                "inverse": name,
                "calls": calls[name],
                "fewer": f"{calls[EXACT] / calls[name]:.1f}x",
                "seconds": f"{median(taken[name]):.2f}",
                "faster": f"{1 / ratio(taken[name], taken[EXACT]):.2f}x",
                "largest difference": f"{float((found[name] - exact).abs().max()):.1e}",
                "calls in float64": wide.nfe if name != EXACT else calls[name],
                "its largest difference": f"{float((clean - exact).abs().max()):.1e}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Samples, measures and writes `starflow_sampling.json`, `starflow_sampling.md`."""
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--n", type=int, nargs="+", default=[1, 4, 16], help="clips")
    options.add_argument("--prompt", default="a three moves left")
    options.add_argument("--tolerance", type=float, default=1e-11, help="of the deep block, on squared values")
    options.add_argument("--shallow-tolerance", type=float, default=3e-8, help="of the others")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    model = model_from_checkpoint(given.checkpoint).eval()
    grid = model.net.tokens(torch.zeros(1, *model.net.shape))[1]
    compared = ways(grid[1] * grid[2], given.tolerance, given.shallow_tolerance)
    rows: list[dict[str, Any]] = []
    for n in given.n:
        z = torch.randn(n, *model.net.shape, generator=torch.Generator().manual_seed(given.seed))
        rows += rows_of(model, compared, Work(z, model.asked(n, None, given.prompt)), given.rounds)
    title = "Sampling moving digits: Jacobi in chunks and in a sliding window beside token by token"
    settings = {"tolerance": given.tolerance, "shallow_tolerance": given.shallow_tolerance, "prompt": given.prompt}
    settings["shape"] = list(model.net.shape)
    write("starflow_sampling", settings, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
