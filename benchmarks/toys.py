"""The 2-D toy of arXiv 2209.03003: three modes to three others, a rectified flow and its reflow against the exact flow.

`python -m penstock.benchmarks.toys` trains both, writes the table of `S`, `V`, transport costs and distances to the
modes, and `toys.png` with the trajectories.
"""

import logging
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from penstock.benchmarks.report import parser, write
from penstock.datamodules.base import KindDataModule, TensorStore, fingerprint
from penstock.datamodules.pair import Pair
from penstock.datamodules.points import DEFAULT_NOISE, THREE_MODES, Points
from penstock.lightning_modules.callbacks.ema import EMA
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.solvers import Heun, Velocity
from penstock.lightning_modules.flow.straightness import cost_identity, transport_cost
from penstock.lightning_modules.flow.times import TimeSampler, UShaped
from penstock.lightning_modules.nets.mlp import MLP
from penstock.lightning_modules.rectified_flow import RectifiedFlow
from penstock.lightning_modules.schedules import WarmupCosine

STEPS = (1, 2, 4, 8, 20, 100)
TRAJECTORY = 100


class Coupled(KindDataModule):
    """Fixed pairs of points: `points` at t = 1 and its own `source` at t = 0, as reflow needs them (section 2.1).

    Args:
        source: `(n, 2)`.
        points: `(n, 2)`, row by row its partners.
        batch_size: global training batch.
    """

    def __init__(self, source: Tensor, points: Tensor, batch_size: int):
        super().__init__(batch_size=batch_size, eval_batch_size=None, num_workers=0, seed=None)
        self.tensors = {"points": points, "source": source}

    def build(self) -> tuple[TensorStore, dict[str, np.ndarray]]:
        numbers = np.arange(len(self.tensors["points"]))
        self.shape, self.class_names = (2,), []
        self.fingerprint = fingerprint("coupled", *(value.numpy() for value in self.tensors.values()))
        return TensorStore(**self.tensors), {"train": numbers, "val": numbers[:0], "test": numbers[:0]}


def three_modes(batch_size: int, size: int = 20_000) -> Pair:
    """Independent pairs of the toy."""
    return Pair(Points("three_modes_source", size=size), Points("three_modes", size=size, batch_size=batch_size))


def exact() -> MixtureFlow:
    """The flow of the toy in closed form, float32."""
    means, std = torch.tensor(THREE_MODES, dtype=torch.float32), DEFAULT_NOISE["three_modes"]
    return MixtureFlow(Mixture.uniform(means, std), Mixture.uniform(-means, std))


def balanced_pairs(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Independent pairs, each `(n, 2)`, every pair of modes equally often, to measure with less noise."""
    means, std = torch.tensor(THREE_MODES, dtype=torch.float32), DEFAULT_NOISE["three_modes"]
    number = torch.arange(n)
    noise = std * torch.randn(2, n, 2, generator=generator)
    return -means[number % 3] + noise[0], means[number // 3 % 3] + noise[1]


def train(
    data: LightningDataModule,
    steps: int,
    *,
    times: TimeSampler | None = None,
    sharpness: float = 1.0,
    lr: float = 5e-3,
    seed: int = 0,
) -> RectifiedFlow:
    """Trains a `RectifiedFlow` of points with Lightning on the CPU; its weights are averages.

    Args:
        data: batches with `points` and, for data-to-data flows, `source`.
        steps: of the optimiser.
        times: law of t; None is uniform.
        sharpness: factor on the first weights of x: the toy's modes are 20 times narrower than the field is wide.
        lr: largest learning rate.
        seed: of weights, order and times.
    """
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    net = MLP(width=128, depth=4, activation="silu", fourier=16)
    with torch.no_grad():
        net.stem.weight[:, :2] *= sharpness
    flow = RectifiedFlow(
        net,
        partial(torch.optim.Adam, lr=lr),
        partial(WarmupCosine, total=steps, warmup=min(50, steps // 2)),
        times=times,
        key="points",
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[EMA(0.99)],
    )
    trainer.fit(flow, datamodule=data)
    return flow.eval()


@torch.no_grad()
def reflow_pairs(flow: RectifiedFlow, source: Tensor, batch_size: int, steps: int = TRAJECTORY) -> Coupled:
    """The pairs (Z0, Z1) that `flow` makes of `source` `(n, 2)` in `steps` Euler steps."""
    return Coupled(source, flow.decode(source, steps=steps), batch_size)


def distance_to_modes(points: Tensor) -> Tensor:
    """Root mean square distance of points `(n, 2)` to their nearest target mode."""
    return torch.cdist(points, torch.tensor(THREE_MODES, dtype=points.dtype)).amin(1).square().mean().sqrt()


@torch.no_grad()
def measure(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor) -> dict[str, float]:
    """Cost identity of the coupling (x0, x1), convex costs, and the distance to the modes for some numbers of steps.

    Args:
        velocity: of the flow.
        x0: source `(n, 2)`.
        x1: its partners at t = 1.
        t: uniform times `(n,)` for V.
    """
    terms = cost_identity(velocity, x0, x1, t, uniform(2 * TRAJECTORY), solver=Heun())
    found = {"E|X1-X0|^2": float(terms.cost_before), "E|Z1-Z0|^2": float(terms.cost_after)}
    found |= {"S": float(terms.straightness), "V": float(terms.crossing), "identity gap": float(terms.gap)}
    paths = {n: trajectory(velocity, x0, n) for n in STEPS}
    for power in (1, 2, 4):
        before, after = transport_cost(x0, x1, power).mean(), transport_cost(x0, paths[TRAJECTORY][-1], power).mean()
        found[f"E|Z1-Z0|^{power} / E|X1-X0|^{power}"] = float(after / before)
    return found | {f"distance to modes, N={n}": float(distance_to_modes(path[-1])) for n, path in paths.items()}


@torch.no_grad()
def trajectory(velocity: Velocity, x0: Tensor, steps: int) -> Tensor:
    """Euler's states `(steps + 1, n, 2)` from `x0` on."""
    states = [x0]
    for i in range(steps):
        states.append(states[-1] + velocity(states[-1], x0.new_full((len(x0),), i / steps)) / steps)
    return torch.stack(states)


def draw(panels: dict[str, Tensor], path: Path) -> None:
    """One panel for each bundle of trajectories `(steps + 1, n, 2)`: lines grey, source blue, end red, modes black."""
    figure = Figure(figsize=(4 * len(panels), 4.2), dpi=120)
    FigureCanvasAgg(figure)
    for axes, (title, states) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axes.plot(*states.permute(2, 0, 1).numpy(), color="0.6", lw=0.4, zorder=1)
        axes.scatter(*states[0].T.numpy(), s=3, color="tab:blue", zorder=2, label="source")
        axes.scatter(*states[-1].T.numpy(), s=3, color="tab:red", zorder=3, label="end")
        axes.scatter(*THREE_MODES.T, s=40, marker="x", color="k", zorder=4, label="target modes")
        axes.set(title=title, xlim=(-13, 13), ylim=(-13, 13), aspect="equal")
    axes.legend(loc="lower right", fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures and writes `toys.json`, `toys.md`, `toys.png`."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=10_000, help="training steps of the first flow")
    options.add_argument("--reflow-steps", type=int, default=4_000, help="training steps of the reflow")
    options.add_argument("--pairs", type=int, default=20_000, help="pairs of the reflow")
    options.add_argument("--n", type=int, default=20_000, help="points that are measured")
    options.add_argument("--batch", type=int, default=512)
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    truth = exact()
    generator = torch.Generator().manual_seed(given.seed + 1)
    x0, x1 = balanced_pairs(given.n, generator)
    t = torch.rand(given.n, generator=generator)
    first = train(three_modes(given.batch), given.steps, sharpness=10, seed=given.seed)
    pairs = reflow_pairs(first, truth.source.sample(given.pairs, generator), given.batch)
    second = train(pairs, given.reflow_steps, times=UShaped(), sharpness=10, seed=given.seed)
    z1 = first.decode(x0, steps=TRAJECTORY).detach()
    flows: dict[str, tuple[Velocity, Tensor]] = {
        "exact": (truth.velocity, x1),
        "1-rectified": (first.net, x1),
        "2-rectified": (second.net, z1),
    }
    found = {name: measure(velocity, x0, partner, t) for name, (velocity, partner) in flows.items()}
    rows: list[dict[str, Any]] = [{"": key, **{name: found[name][key] for name in flows}} for key in found["exact"]]
    title = "Three-mode toy: a rectified flow and its reflow against the exact flow"
    write("toys", {"flows": found}, rows, title=title, seed=given.seed, out=given.out)
    few = x0[:300]
    panels = {
        f"{name}, {TRAJECTORY} steps": trajectory(v, few, TRAJECTORY)
        for name, (v, _) in flows.items()
        if name != "exact"
    }
    panels |= {f"{name}, 1 step": trajectory(v, few, 1) for name, (v, _) in flows.items() if name != "exact"}
    draw(panels, given.out / "toys.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
