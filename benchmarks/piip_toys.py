"""What the small pyramids of `penstock table piip_imagenet` cost, side by side: inverted, equal, reversed, one branch.

`python -m penstock.benchmarks.piip_toys --threads 1`. The networks of the table, of random weights, take turns in one
process: predictions of one image and of a batch, and a step of training of the batch. Operations count a multiplication
and an addition as two.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, ratio
from penstock.lightning_modules.callbacks.inference_cost import operations
from penstock.lightning_modules.nets.piip.tiny import tiny_classifier

SIZES = {"digits": (16, 32, 64), "CIFAR-10": (32, 64, 96)}
FIRST = "inverted"


def networks(sizes: Sequence[int]) -> dict[str, nn.Module]:
    """The rows of the table by name; gates are open a little, as after training."""
    make = partial(tiny_classifier, num_classes=10, size=sizes[-1])
    found = {
        FIRST: make(sizes, (96, 64, 32)),
        "inverted, no interactions": make(sizes, (96, 64, 32), interactions=False),
        "largest branch alone, its image": make(sizes[:1], (96,)),
        "largest branch alone, the largest image": make(sizes[-1:], (96,)),
        "equal branches": make(sizes, (64, 64, 64)),
        "reversed": make(sizes, (32, 64, 96)),
    }
    for net in found.values():
        for name, gate in net.named_parameters():
            if name.endswith("_gate"):
                nn.init.constant_(gate, 0.1)
    return found


def lines(data: str, batch: int, rounds: int, device: torch.device) -> list[dict]:
    """A line a network, in milliseconds, and the times of a step over that of the inverted pyramid."""
    sizes = SIZES[data]
    image = torch.rand(batch, 3, sizes[-1], sizes[-1], device=device) * 2 - 1
    labels = torch.arange(batch, device=device) % 10
    nets = {name: net.to(device) for name, net in networks(sizes).items()}

    def predict(net: nn.Module, number: int) -> Tensor:
        with torch.inference_mode():
            return net.eval()(image[:number])

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss = F.cross_entropy(net.train()(image), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def timed(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        return alternate(works, rounds, device)

    one, many = (timed({name: partial(predict, net, n) for name, net in nets.items()}) for n in (1, batch))
    steps = timed({name: partial(step, net, torch.optim.AdamW(net.parameters())) for name, net in nets.items()})
    return [
        {
            "data": data,
            "network": name,
            "parameters, M": sum(p.numel() for p in net.parameters()) / 1e6,
            "GFLOP": operations(partial(predict, net, 1)) / 1e9,
            "one image, ms": 1e3 * median(one[name]),
            f"{batch} images, ms": 1e3 * median(many[name]),
            "step, ms": 1e3 * median(steps[name]),
            "step over inverted": ratio(steps[name], steps[FIRST]),
        }
        for name, net in nets.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the table of costs."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--rounds", type=int, default=10, help="counted turns of each network")
    options.add_argument("--batch", type=int, default=64)
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    rows = [row for data in SIZES for row in lines(data, given.batch, given.rounds, torch.device(given.device))]
    values = {"rounds": given.rounds, "batch": given.batch, "device": given.device}
    title = "Small pyramids: what predictions and steps of training take"
    write(f"piip_toys_{given.device}", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
