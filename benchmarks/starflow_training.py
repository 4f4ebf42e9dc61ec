"""Training steps of the 1.4 B preset of STARFlow: tokens a second and the share of the machine's matmul speed.

`python -m penstock.benchmarks.starflow_training --device cuda --official PATH`, where PATH is a checkout of
apple/ml-starflow (needs einops). A step is forward, likelihood, backward and fused AdamW under bfloat16 autocast, on
one batch that is on the device. Rivals start from the same weights, one after the other, each with the machine to
itself: ours compiled, ours eager, ours without its kernels, and the released network eager and compiled. The share
(MFU) is of the speed of a large matmul measured in the same run.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from penstock.benchmarks.official_starflow import released
from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, seconds
from penstock.kernels.dispatch import backend
from penstock.lightning_modules.flow.affine import nll
from penstock.lightning_modules.nets.starflow import STARFlow

Loss = Callable[[Tensor, Tensor], Tensor]


def forward_flops(net: STARFlow, tokens: int, text: int = 1, causal: bool = True) -> int:
    """Floating-point operations of one sample through all blocks, 2 for a multiplication and its addition.

    With N tokens in a block, width d, C channels of a token and L text tokens of E numbers (in the deep block alone):
    `24 N d^2` a layer in its linear maps, `4 N^2 d` in attention to all, `2 N (N + 1) d` in causal attention, which is
    what has to be computed; `6 (N - L) C d` at both ends and `2 L E d` for the text. Norms, activations and rotations
    do not count. A step with gradients takes three times as many.

    Args:
        net: The flow, with plain layers.
        tokens: Of a sample, a patch each.
        text: L.
        causal: Whether keys that a query must not see are left out.
    """
    total = 0
    for block in net.blocks:
        dim, length = block.proj_in.out_features, text if block.text_dim else 0
        n = tokens + length
        pairs = n * (n + 1) // 2 if causal else n * n
        total += len(block.attn_blocks) * (24 * n * dim**2 + 4 * pairs * dim)
        total += 6 * tokens * block.channels * dim + 2 * length * block.text_dim * dim
    return total


def matmul_speed(device: torch.device, dtype: torch.dtype, size: int, rounds: int = 10) -> float:
    """Floating-point operations a second of a square matmul, the best of `rounds`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = 20 if device.type == "cuda" else 1
    taken = alternate({"matmul": lambda: [a @ b for _ in range(times)]}, rounds, device, 3)["matmul"]
    return 2 * size**3 * times / min(taken)


def our_loss(net: STARFlow, x: Tensor, label: Tensor) -> Tensor:
    """Nats a dimension, less a constant, of images of a class."""
    flow = net(x, label)
    return nll(flow.z, flow.logdets).mean()


def their_loss(model: nn.Module, classes: int, x: Tensor, label: Tensor) -> Tensor:
    """The same by the released network."""
    text = nn.functional.one_hot(label, classes + 1).to(x.dtype)[:, None]
    z, _, _, logdets = model(x, text)
    return model.get_loss(z, logdets)["loss"]


def trained(loss: Loss, net: nn.Module, x: Tensor, label: Tensor, steps: int, warmup: int) -> tuple[float, float]:
    """Loss of the first step, and the median seconds of those after `warmup`."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, (0.9, 0.95), fused=True)
    losses: list[Tensor] = []

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            found = loss(x, label)
        found.backward()
        optimizer.step()
        losses.append(found.detach())

    taken = [seconds(step, x.device) for _ in range(warmup + steps)]
    return float(losses[0]), median(taken[warmup:])


def network(given: Any) -> STARFlow:
    """The preset, or a smaller one; its last layers are not zero, so that all of it has gradients."""
    torch.manual_seed(given.seed)
    net = STARFlow(given.shape, given.dim, given.depths, num_classes=given.classes, side=given.shape[-1])
    for block in net.blocks:
        nn.init.normal_(block.proj_out.weight, std=0.02)
    return net


def rivals(given: Any, device: torch.device) -> dict[str, Callable[[], tuple[Loss, nn.Module]]]:
    """Makers of what is compared, by name."""

    def ours(compiled: bool) -> tuple[Loss, nn.Module]:
        with device:
            net = network(given)
        if compiled:
            net.compile()
        return partial(our_loss, net), net

    def theirs(compiled: bool) -> tuple[Loss, nn.Module]:
        with device:
            model = released(given.official, network(given), 1)
        if compiled:
            model.compile()
        return partial(their_loss, model, given.classes), model

    found = {"ours, compiled": partial(ours, True), "ours, eager": partial(ours, False)}
    found["plain PyTorch, eager"] = partial(ours, False)
    if given.official is not None:
        found |= {"released, eager": partial(theirs, False), "released, compiled": partial(theirs, True)}
    return {name: make for name, make in found.items() if not (given.no_compile and name.endswith("compiled"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `starflow_training_<device>.json` and `.md`, after every rival."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--shape", type=int, nargs=3, default=[4, 32, 32], help="channels, rows, columns")
    options.add_argument("--dim", type=int, default=2048)
    options.add_argument("--depths", type=int, nargs="+", default=[2, 2, 2, 2, 2, 18])
    options.add_argument("--classes", type=int, default=1000)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--warmup", type=int, default=5)
    options.add_argument("--matmul", type=int, default=8192, help="rows of the square matrices of the measured speed")
    options.add_argument("--official", type=Path, help="checkout of apple/ml-starflow")
    options.add_argument("--no-compile", action="store_true", help="leaves torch.compile out")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    with torch.device("meta"):
        shapes = network(given)
    weights, tokens = sum(p.numel() for p in shapes.parameters()), given.shape[-1] * given.shape[-2]
    flops = 3 * forward_flops(shapes, tokens) * given.batch
    generator = torch.Generator(device).manual_seed(given.seed)
    x = torch.randn(given.batch, *given.shape, device=device, generator=generator)
    label = torch.randint(given.classes, (given.batch,), device=device, generator=generator)
    speed = matmul_speed(device, torch.bfloat16, given.matmul)
    title = f"Training steps of STARFlow, {weights / 1e9:.2f} B weights, on {given.device} in bfloat16"
    title += f" (a matmul of {given.matmul} reaches {speed / 1e12:.3g} TFLOP/s)"
    settings = {key: value for key, value in vars(given).items() if isinstance(value, (int, float, str, list))}
    settings |= {"parameters": weights, "matmul_tflops": speed / 1e12, "step_tflop": flops / 1e12}
    rows: list[dict[str, Any]] = []
    for name, make in rivals(given, device).items():
        with backend("reference") if name.startswith("plain") else nullcontext():
            loss, net = make()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            first, spent = trained(loss, net, x, label, given.steps, given.warmup)
        rows.append(
            {
                "step": name,
                "seconds": spent,
                "tokens/s": given.batch * tokens / spent,
                "TFLOP/s": flops / spent / 1e12,
                "MFU": f"{flops / spent / speed:.1%}",
                "peak GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
                "first loss": f"{first:.4f}",
            }
        )
        del loss, net
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        stem = f"starflow_training_{given.device}"
        write(stem, settings, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
