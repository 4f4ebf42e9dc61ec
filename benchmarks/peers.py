"""Training and sampling against torchcfm: the same net, batch and machine, turn by turn.

`python -m penstock.benchmarks.peers`. Training: `penstock fit experiment=rectified_flow_digits` with all its callbacks
against the loop of torchcfm's image examples. Sampling: `RectifiedFlow.sample` with 100 Euler steps against what these
examples call, torchdyn's NeuralODE and torchdiffeq, on the same weights and labels.
"""

import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from penstock.benchmarks.interleave import Contest, contest
from penstock.benchmarks.overhead import WORDS
from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, ratio
from penstock.lightning_modules.build import build
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.rectified_flow import RectifiedFlow

OT = "model.coupling.class_path=penstock.lightning_modules.flow.couplings.MinibatchOT"


class _Field(nn.Module):
    """The net with its labels as the field `f(t, x)` of ODE libraries."""

    def __init__(self, net: nn.Module, label: Tensor):
        super().__init__()
        self.net, self.label = net, label

    def forward(self, t: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self.net(x, t.expand(len(x)), self.label)


def samplers(module: RectifiedFlow, n: int, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Each draws `n` class-balanced samples with `steps` Euler steps."""
    from torchdiffeq import odeint
    from torchdyn.core import NeuralODE

    label = torch.arange(n, device=module.device) % module.num_classes
    field, grid = _Field(module.net, label), torch.linspace(0, 1, steps + 1, device=module.device)
    node = NeuralODE(field, solver="euler", sensitivity="adjoint")

    def noise() -> Tensor:
        return torch.randn(n, *module.net.shape, device=module.device)

    draws = {
        "penstock": lambda: module.sample(n, steps=steps, cond=label),
        "torchcfm (torchdyn NeuralODE, euler)": lambda: node.trajectory(noise(), t_span=grid)[-1],
        "torchcfm (torchdiffeq odeint, euler)": lambda: odeint(field, noise(), grid, method="euler")[-1],
    }
    return {name: torch.no_grad()(draw) for name, draw in draws.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `peers.json` and `peers.md`."""
    options = parser(__doc__)
    options.add_argument("--experiment", default="rectified_flow_digits")
    options.add_argument("--turns", type=int, default=40, help="turns of each training loop that count")
    options.add_argument("--block", type=int, default=25, help="steps of a turn")
    options.add_argument("--rounds", type=int, default=10, help="turns of each sampler")
    options.add_argument("--n", type=int, default=128, help="samples of a turn")
    options.add_argument("--steps", type=int, default=100, help="Euler steps")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the samplers")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    words = [f"experiment={given.experiment}", f"seed_everything={given.seed}"]
    training: dict[str, Contest] = {
        "training, independent pairs": contest("torchcfm", [*words, *WORDS], given.turns, given.block, given.threads),
        "training, exact OT": contest("torchcfm_ot", [*words, *WORDS, OT], given.turns, given.block, given.threads),
    }
    rows = [
        {
            "what": what,
            "penstock": f"{c.rival_steps_per_second / (1 + c.overhead):.3g} steps/s",
            "torchcfm": f"{c.rival_steps_per_second:.3g} steps/s",
            "penstock's speed": 1 / (1 + c.overhead),
            "in CPU time": 1 / (1 + c.cpu_overhead),
        }
        for what, c in training.items()
    ]
    module: RectifiedFlow = build(compose(words)[0], "model")[0].to(given.device).eval()
    taken = alternate(samplers(module, given.n, given.steps), given.rounds, module.device)
    ours = taken.pop("penstock")
    rows += [
        {
            "what": f"{given.n} samples, {given.steps} Euler steps, {name}",
            "penstock": f"{median(ours):.3g} s",
            "torchcfm": f"{median(theirs):.3g} s",
            "penstock's speed": ratio(theirs, ours),
            "in CPU time": None,
        }
        for name, theirs in taken.items()
    ]
    values = {"target": "at least 1", "training": {k: c._asdict() for k, c in training.items()}}
    write("peers", values, rows, title="Penstock against torchcfm", seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
