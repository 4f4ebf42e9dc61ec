"""Kernels of STARFlow and STARFlow-V against eager PyTorch, torch.compile and decoding as published.

`python -m penstock.benchmarks.starflow_kernels` on the CPU, where the references run; `... --device cuda`, in bfloat16,
or `--dtype float32`. Sizes on a GPU are those of the deep block of the released STARFlow-V (arXiv 2511.20462) and of a
clip of 480p. The limit is the time that a copy takes to move the bytes that have to be read and written; attention of
the denoiser is far above it, for it computes.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, seconds
from penstock.kernels import rotary
from penstock.kernels.affine import encode
from penstock.kernels.cached_attention import cached_attention
from penstock.kernels.dispatch import backend, use_triton
from penstock.kernels.jacobi import update
from penstock.kernels.rotary import rotate
from penstock.lightning_modules.nets.causal_transformer import _flex
from penstock.lightning_modules.nets.flow_denoiser import frame_blocks, frame_mask


class Sizes(NamedTuple):
    """Samples, heads and their size, frames and tokens of a frame, text, tokens of a chunk, channels of a token."""

    batch: int
    heads: int
    size: int
    frames: int
    frame: int
    text: int
    chunk: int
    channels: int


SIZES = {"cpu": Sizes(1, 8, 64, 8, 256, 16, 32, 16), "cuda": Sizes(2, 64, 64, 21, 1590, 256, 32, 48)}


class Case(NamedTuple):
    """A kernel and its rivals.

    Attributes:
        name: Of the row.
        work: Through the kernel.
        inputs: Of `work`.
        gradients: Whether gradients of the inputs are made, too.
        nbytes: That have to be read and written.
        eager: What stands for eager PyTorch; None is `work` on the reference, which is compiled, too.
        published: `work` as the release does it.
    """

    name: str
    work: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    gradients: bool
    nbytes: int
    eager: Callable[..., Tensor] | None = None
    published: Callable[..., Tensor] | None = None


def cases(s: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All kernels at the sizes of a network; block-sparse attention on a GPU only."""
    normal = partial(torch.randn, device=device)
    tokens = s.frames * s.frame
    places, width = s.text + tokens, torch.finfo(dtype).bits // 8
    angles = normal(places, s.size // 2)
    cos, sin = angles.cos(), angles.sin()

    raw, u = normal(s.batch, tokens, 2 * s.channels, dtype=dtype), normal(s.batch, tokens, s.channels)
    moved = 2 * raw.nbytes + u.nbytes + u.nbytes + u.nbytes + raw.nbytes + 4 * u.nbytes
    yield Case("affine map and log-determinant, with gradients", encode, (raw, u), True, moved)

    x = normal(s.batch, s.heads, places, s.size, dtype=dtype)
    turn = partial(rotate, cos=cos, sin=sin)
    yield Case("rotation of the queries of a clip, with gradients", turn, (x,), True, 4 * x.nbytes)

    laws = [normal(s.batch, s.chunk, s.channels) for _ in range(4)]
    yield Case("Jacobi update of a chunk", update, tuple(laws), False, 5 * laws[0].nbytes)

    new = [normal(s.batch, s.heads, s.chunk, s.size, dtype=dtype) for _ in range(3)]
    store = [normal(s.batch, s.heads, places, s.size, dtype=dtype) for _ in range(2)]
    start = places - s.chunk
    attend = partial(cached_attention, start=start, cos=cos, sin=sin)
    on_read = partial(rotated_on_read, start=start, cos=cos, sin=sin)
    moved = sum(x.nbytes for x in store) + 6 * new[0].nbytes
    yield Case("attention of a chunk to the cache", attend, (*new, *store), False, moved, None, on_read)

    if device.type == "cuda":
        heads = min(s.heads, 48)
        parts = tuple(normal(1, heads, places, s.size, dtype=dtype) for _ in range(3))
        given = (s.frames, s.frame, s.text, 0, 10, True, device)
        sparse = partial(_flex(True), block_mask=frame_blocks(*given))
        dense = partial(F.scaled_dot_product_attention, attn_mask=frame_mask(*given))
        moved = 12 * width * heads * places * s.size
        yield Case("block-sparse attention of the denoiser, with gradients", sparse, parts, True, moved, dense)


def rotated_on_read(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, start: int, cos: Tensor, sin: Tensor
) -> Tensor:
    """Attention to a cache of keys before rotation: all of them are rotated in every call, as in the release."""
    n, end = query.shape[2], start + query.shape[2]
    keys[:, :, start:end], values[:, :, start:end] = key, value
    query = rotary.reference(query, cos[start:end], sin[start:end])
    keys = rotary.reference(keys[:, :, :end], cos[:end], sin[:end])
    mask = torch.ones(n, end, dtype=torch.bool, device=query.device).tril(start)
    return F.scaled_dot_product_attention(query, keys, values[:, :, :end], mask)


def called(case: Case, work: Callable[..., Tensor | tuple[Tensor, ...]], reference: bool, times: int = 1) -> None:
    """Runs `work` on the inputs of a case, forward and, where it asks for gradients, backward."""
    with backend("reference" if reference else "auto"), torch.set_grad_enabled(case.gradients):
        for _ in range(times):
            inputs = [x.detach().requires_grad_(case.gradients) for x in case.inputs]
            found = work(*inputs)
            if case.gradients:
                found = found if isinstance(found, tuple) else (found,)
                torch.autograd.grad(found, inputs, found)


def bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    taken = alternate({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]
    return 2 * source.nbytes / median(taken)


def row(case: Case, device: torch.device, rounds: int, limit: float, compiled: bool) -> dict[str, object]:
    """A line of the table: medians in milliseconds."""
    eager = case.eager or case.work
    rivals = {"ours": (case.work, False), "eager": (eager, True)}
    if compiled:
        rivals["torch.compile"] = (torch.compile(eager, dynamic=False), True)
    if case.published is not None:
        rivals["as published"] = (case.published, True)
    for work, reference in rivals.values():
        called(case, work, reference)
    times = max(1, min(100, int(0.05 / seconds(lambda: called(case, *rivals["eager"]), device))))
    works = {name: partial(called, case, *rival, times) for name, rival in rivals.items()}
    taken = {name: 1e3 * median(spent) / times for name, spent in alternate(works, rounds, device).items()}
    least = 1e3 * case.nbytes / limit
    columns = ("ours", "eager", "torch.compile", "as published")
    return {
        "work": case.name,
        "ours is": "Triton" if use_triton(case.inputs[0]) else "the reference",
        **{f"{name}, ms": taken.get(name) for name in columns},
        "eager / ours": taken["eager"] / taken["ours"],
        "memory limit, ms": least,
        "ours / memory limit": taken["ours"] / least,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `starflow_kernels_<device>.json` and `.md`, with the dtype in their names unless float32."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument(
        "--dtype", help="of the network; bfloat16 on a GPU by default", choices=["float32", "bfloat16"]
    )
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--no-compile", action="store_true", help="leaves torch.compile out")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    device, sizes = torch.device(given.device), SIZES[given.device]
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    limit = bandwidth(device, given.rounds)
    work = cases(sizes, device, getattr(torch, dtype))
    rows = [row(case, device, given.rounds, limit, not given.no_compile) for case in work]
    title = f"Kernels of STARFlow on {given.device}, {dtype} (a copy moves {limit / 1e9:.0f} GB/s)"
    name = f"starflow_kernels_{given.device}" + ("" if dtype == "float32" else f"_{dtype}")
    values = {"bandwidth_gb_per_second": limit / 1e9, "sizes": sizes._asdict()}
    write(name, values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
