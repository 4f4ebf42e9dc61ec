"""Sampling clips of 480p by a large flow of random weights: Jacobi beside token by token, and beside the released code.

`python -m penstock.benchmarks.starflow_large --device cuda --official PATH`, where PATH is a checkout of
apple/ml-starflow (needs einops), writes tokens a second, network calls, peak memory and how far the clips are from
those made token by token. All start from the same noise, weights, text and tolerance. Random weights say what a call
costs, not how many a trained flow needs: that follows from `--strength`, the deviation of the network's output.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from penstock.benchmarks.official_starflow import released
from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import seconds
from penstock.lightning_modules.flow.affine import ScoreGuidance
from penstock.lightning_modules.flow.inverse import Inverse, Jacobi
from penstock.lightning_modules.flow.inverse import Sequential as TokenByToken
from penstock.lightning_modules.flow.sliding import Sliding
from penstock.lightning_modules.nets.starflow import STARFlow

EXACT = "token by token"
TEXT_DIM = 2048


class Work(NamedTuple):
    """Noise, text, text of the unconditional half and the weight of guidance, 0 for none."""

    z: Tensor
    text: Tensor
    empty: Tensor
    guidance: float


class Found(NamedTuple):
    """Clips, network calls, seconds and, on a GPU, the peak of memory in GiB, weights included."""

    x: Tensor
    calls: int
    seconds: float
    gib: float | None


def network(shape: Sequence[int], dim: int, deep: int, depths: Sequence[int], strength: float) -> STARFlow:
    """A flow whose outputs before the clip have the deviation `strength`, on the default device."""
    net = STARFlow(shape, dim, depths, deep, text_dim=TEXT_DIM, side=32)
    for block in net.blocks:
        nn.init.normal_(block.proj_out.weight, std=strength / block.proj_out.in_features**0.5)
    return net.eval().requires_grad_(False)


def ways(chunk: int, windows: Sequence[int], tolerance: float) -> dict[str, Inverse]:
    """Ours, by name; chunks are as published, four times as long after the first frame."""
    found: dict[str, Inverse] = {EXACT: TokenByToken()}
    found[f"chunks of {chunk} and {4 * chunk}"] = Jacobi(chunk, 4 * chunk, tolerance)
    return found | {f"a window of {window}": Sliding(window, tolerance, 32) for window in windows}


def ours(net: STARFlow, inverse: Inverse, work: Work) -> tuple[Tensor, int]:
    """Clips and calls by one of our inverses, cache in the precision of the weights."""
    net.null_text = work.empty[0]
    guidance = ScoreGuidance(work.guidance) if work.guidance else None
    x, traces = net.decode(work.z, inverse, None, work.text, guidance)
    return x, sum(trace.calls for trace in traces)


def theirs(model: nn.Module, work: Work, jacobi: dict[str, Any]) -> tuple[Tensor, int]:
    """Clips and calls of the released sampler, without options token by token."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hooks = [block.proj_out.register_forward_hook(count) for block in model.blocks]
    text = torch.cat([work.text, work.empty]) if work.guidance else work.text
    with torch.no_grad():
        x = model(work.z, text, reverse=True, guidance=work.guidance, jacobi=bool(jacobi), **jacobi)
    for hook in hooks:
        hook.remove()
    return x, calls


def measured(run: Callable[[], tuple[Tensor, int]], weights: nn.Module) -> Found:
    """Runs a sampler once; memory that others hold does not count."""
    found: list[tuple[Tensor, int]] = []
    device = next(weights.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    spent = seconds(lambda: found.append(run()), device)
    gib = None
    if device.type == "cuda":
        own = sum(p.numel() * p.element_size() for p in weights.parameters())
        gib = (torch.cuda.max_memory_allocated(device) - before + own) / 2**30
    (x, calls), *_ = found
    return Found(x.float().cpu(), calls, spent, gib)


def row(name: str, found: Found, exact: Found) -> dict[str, Any]:
    """A line of the table."""
    apart = (found.x - exact.x).square().mean().sqrt() / exact.x.square().mean().sqrt()
    tokens = found.x.numel() // found.x.shape[2]
    return {
        "sampler": name,
        "calls": found.calls,
        "fewer": f"{exact.calls / found.calls:.1f}x",
        "seconds": found.seconds,
        "tokens/s": tokens / found.seconds,
        "faster": f"{exact.seconds / found.seconds:.2f}x",
        "peak GiB": found.gib,
        "rms difference": f"{float(apart):.1e}",
        "largest difference": f"{float((found.x - exact.x).abs().max()):.1e}",
    }


def samplers(
    net: STARFlow, given: Any, work: Work, made: Callable[[], nn.Module | None]
) -> Iterator[tuple[str, Found]]:
    """All that are compared, by name, token by token first; the released network is made last."""
    short = work._replace(z=work.z[:, :1])
    for name, inverse in ways(given.chunk, given.windows, given.tolerance).items():
        if name != EXACT:
            ours(net, inverse, short)
        yield name, measured(lambda inverse=inverse: ours(net, inverse, work), net)
    if (model := made()) is not None:
        options = {"jacobi_block_size": given.chunk, "jacobi_th": given.tolerance, "jacobi_max_iter": 32}
        theirs(model, short, options)
        yield "released, in chunks", measured(lambda: theirs(model, work, options), model)
        if not given.no_released_tokens:
            yield f"released, {EXACT}", measured(lambda: theirs(model, work, {}), model)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `starflow_large_<device>_<dtype>.json` and `.md`, after every sampler."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of weights and caches")
    options.add_argument("--shape", type=int, nargs=4, default=[5, 48, 30, 53], help="frames, channels, rows, columns")
    options.add_argument("--dim", type=int, default=1280, help="width of the shallow blocks")
    options.add_argument("--deep-dim", type=int, default=1536)
    options.add_argument("--depths", type=int, nargs="+", default=[2, 2, 2, 18])
    options.add_argument("--text", type=int, default=128, help="text tokens")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--guidance", type=float, default=0.0)
    options.add_argument("--strength", type=float, default=0.5)
    options.add_argument("--chunk", type=int, default=64)
    options.add_argument("--windows", type=int, nargs="+", default=[256, 512, 1024])
    options.add_argument("--tolerance", type=float, default=1e-3, help="of squared values")
    options.add_argument("--official", type=Path, help="checkout of apple/ml-starflow")
    options.add_argument("--no-released-tokens", action="store_true", help="leaves the released token by token out")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    with device:
        net = network(given.shape, given.dim, given.deep_dim, given.depths, given.strength).to(dtype)
        z = torch.randn(given.batch, *given.shape)
        text, empty = (torch.randn(given.batch, given.text, TEXT_DIM, dtype=dtype) for _ in range(2))
        empty = empty[:1].expand(given.batch, -1, -1)
    weights = sum(p.numel() for p in net.parameters())
    work = Work(z, text, empty, given.guidance)
    title = f"Sampling with {weights / 1e9:.2f} B random weights on {given.device}, {given.dtype}"
    settings = {key: value for key, value in vars(given).items() if isinstance(value, (int, float, str, list))}
    rows, start, exact = [], time.perf_counter(), None

    def made() -> nn.Module | None:
        return None if given.official is None else released(given.official, net, given.text)

    for name, found in samplers(net, given, work, made):
        exact = exact or found
        rows.append(row(name, found, exact))
        settings |= {"parameters": weights, "seconds": time.perf_counter() - start}
        stem = f"starflow_large_{given.device}_{given.dtype}"
        write(stem, settings, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
