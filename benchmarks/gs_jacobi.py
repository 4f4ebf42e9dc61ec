"""What a trained flow's blocks take to invert, the inverses that GS-Jacobi chooses for them, and others by hand.

`python -m penstock.benchmarks.gs_jacobi CHECKPOINT` passes test data through the flow once (arXiv 2505.12849), prints
both metrics of each block, and samples by the inverses that follow from them and by those set by hand, from the same
noise. `gs_jacobi.yaml` holds `inverse` and `shallow` of the model as they were chosen.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor

from penstock.benchmarks.report import parser, table, write
from penstock.benchmarks.timing import alternate
from penstock.kernels.philox import Draws
from penstock.lightning_modules.autoregressive_module import AutoregressiveModule
from penstock.lightning_modules.build import build, config_of_checkpoint, model_from_checkpoint
from penstock.lightning_modules.flow.inverse import Inverse, Jacobi
from penstock.lightning_modules.flow.inverse import Sequential as TokenByToken
from penstock.lightning_modules.gs_jacobi import Metrics, choose, config, measure

MOST = 1000


def noisy_data(model: AutoregressiveModule, data: LightningDataModule, n: int) -> tuple[Tensor, Tensor | None]:
    """Up to `n` samples of the test split with the noise of training, and their conditions."""
    data.prepare_data()
    data.setup("test")
    batch = data.finished(next(iter(data.reference_dataloader("test"))))
    batch = {key: value[:n] for key, value in batch.items()}
    draws = Draws(0, 0, batch["index"])
    x = model.data(batch, draws)
    return x + model.noise * draws.normal("noise", x.shape[1:], x.dtype), model.condition(batch)


def by_hand(metrics: Sequence[Metrics], chosen: Sequence[Jacobi], segments: int) -> dict[str, list[Inverse]]:
    """Inverses of all blocks by name: the chosen ones; the same everywhere; segments for the one half of the blocks."""
    found: dict[str, list[Inverse]] = {"token by token": [TokenByToken()] * len(metrics), "chosen": list(chosen)}
    last = len(metrics) - 1
    places = {"no block": set(), "the deep block": {last}, "the other blocks": set(range(last)), "all blocks": None}
    for (name, cut), start in product(places.items(), ("noise", "zeros")):
        found[f"segments in {name}, from {start}"] = [
            replace(
                one,
                chunk=-(-block.tokens // segments) if cut is None or i in cut else block.tokens,
                start=start,
                max_sweeps=MOST,
            )
            for i, (block, one) in enumerate(zip(metrics, chosen, strict=True))
        ]
    return found


def work(metrics: Sequence[Metrics], inverses: Sequence[Inverse], traces: Sequence[Any]) -> float:
    """Sweeps that a token takes, all blocks together; traces come deep block first."""
    total = 0.0
    for block, inverse, trace in zip(metrics, inverses, reversed(traces), strict=True):
        chunk = inverse.chunk if isinstance(inverse, Jacobi) else 1
        sizes = [min(chunk, block.tokens - start) for start in range(0, block.tokens, chunk)]
        total += sum(a * b for a, b in zip(trace.sweeps, sizes, strict=True)) / block.tokens
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `gs_jacobi.json`, `gs_jacobi.md` and `gs_jacobi.yaml`."""
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--data", type=int, default=64, help="samples that the metrics are measured on")
    options.add_argument("--n", type=int, default=16, help="samples that are made")
    options.add_argument("--segments", type=int, default=8)
    options.add_argument("--tolerance", type=float, default=1e-8, help="of squared values")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    model = model_from_checkpoint(given.checkpoint).eval()
    (data,) = build(config_of_checkpoint(given.checkpoint), "data")
    x, cond = noisy_data(model, data, given.data)
    metrics = measure(model.net, x, cond)
    blocks = [
        {"block": i, "tokens": block.tokens, "CRM": block.crm} | {f"IGM {k}": block.igm.get(k) for k in metrics[-1].igm}
        for i, block in enumerate(metrics)
    ]
    print(table(blocks))
    chosen = choose(metrics, given.segments, given.tolerance, MOST, MOST)
    compared = by_hand(metrics, chosen, given.segments)
    z = torch.randn(given.n, *x.shape[1:], generator=torch.Generator().manual_seed(given.seed))
    cond = None if cond is None else cond[torch.arange(given.n) % len(cond)]
    made, calls, swept = {}, {}, {}

    def runner(name: str):
        def run():
            *model.shallow, model.inverse = compared[name]
            made[name] = model.inverted(z, None, cond, None)
            calls[name], swept[name] = model.nfe, work(metrics, compared[name], model.traces)

        return run

    model.shallow = []
    with torch.inference_mode():
        taken = alternate({name: runner(name) for name in compared}, given.rounds, z.device)
    rows = [
        {
            "inverse": name,
            "calls": calls[name],
            "sweeps of a token": f"{swept[name]:.1f}",
            "seconds": f"{median(taken[name]):.2f}",
            "largest difference": f"{float((made[name] - made['token by token']).abs().max()):.1e}",
        }
        for name in compared
    ]
    settings = {"blocks": blocks, "chosen": config(chosen), "tolerance": given.tolerance, "samples": given.n}
    title = "GS-Jacobi: inverses by its metrics and by hand"
    write("gs_jacobi", settings, rows, title=title, seed=given.seed, out=given.out)
    (given.out / "gs_jacobi.yaml").write_text(yaml.safe_dump(config(chosen), sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
