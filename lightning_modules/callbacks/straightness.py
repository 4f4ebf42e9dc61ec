"""How straight the flow of a run is, beside the flow that it started from (arXiv 2209.03003 section 3)."""

from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor

from penstock.kernels.philox import Draws
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.callbacks.generation import EvaluationCallback
from penstock.lightning_modules.callbacks.pictures import keep_picture, rendered
from penstock.lightning_modules.callbacks.ranks import rank_and_world
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.solvers import Euler
from penstock.lightning_modules.flow_module import FlowModule

SHOWN = 100


class Paths(NamedTuple):
    """Euler paths of a flow: `states` `(steps + 1, n, *shape)` from t = 0 to 1, and `deviation` `(steps,)`.

    `deviation[j] = E |(Z_1 - Z_0) - v(Z_t, t)|^2` at `t = j / steps`, summed over dimensions; its mean over t is S(Z).
    """

    states: Tensor
    deviation: Tensor


class Straightness(EvaluationCallback):
    """Logs `straightness`, S(Z) of the run's flow (0 = straight), and `straightness/teacher` of the one before it.

    Draws `samples/straightness.png`, `E |Z_1 - Z_0 - v(Z_t, t)|^2` over t, and for flows of points (2-D)
    `samples/trajectories.png`: paths from the same points, before and after. They start at noise, or in flows from data
    to data at source samples of the test split, which the DataModule's `starts` gives.

    Args:
        teacher: Checkpoint of the flow before this one; None shows this one alone.
        n: Paths, at least 2.
        steps: Euler steps of a path, at least 2.
        every_n_validations: 0 = only after `validate` and `test`.
        seed: of the noise.

    Raises:
        UserError: a number out of range, or a module that is no flow.
    """

    def __init__(
        self, teacher: str | None = None, n: int = 256, steps: int = 100, every_n_validations: int = 0, seed: int = 0
    ):
        super().__init__(every_n_validations)
        for name, value in {"n": n, "steps": steps}.items():
            if value < 2:
                raise UserError(f"Straightness.{name}: {value} given, expected at least 2")
        self.teacher, self.n, self.steps, self.seed = teacher, n, steps, seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not isinstance(pl_module, FlowModule):
            raise UserError(
                f"Straightness: {type(pl_module).__name__} is no flow; expected callbacks.straightness=null"
            )

    def evaluate(self, trainer: pl.Trainer, pl_module: FlowModule) -> None:
        """The same on every rank, as sharded networks need; rank 0 draws."""
        starts = getattr(trainer.datamodule, "starts", None)
        x0 = noises(pl_module, self.n, self.seed) if starts is None else starts(self.n).to(pl_module.device)
        flows = {"this flow": follow(pl_module, x0, self.steps)}
        if self.teacher:
            before = model_from_checkpoint(Path(self.teacher)).to(pl_module.device)
            flows = {"teacher": follow(before, x0, self.steps), **flows}
        values = {"straightness": flows["this flow"].deviation.mean()}
        if "teacher" in flows:
            values["straightness/teacher"] = flows["teacher"].deviation.mean()
        pl_module.log_dict(values, on_epoch=True, batch_size=1, sync_dist=True)
        if rank_and_world()[0]:
            return
        suffix = f"_{trainer.global_step:06d}" if trainer.state.fn == TrainerFn.FITTING else ""
        keep_picture(trainer, rendered(draw_deviation(flows)), f"straightness{suffix}", "straightness")
        if tuple(pl_module.net.shape) == (2,):
            keep_picture(trainer, rendered(draw_paths(flows)), f"trajectories{suffix}", "trajectories")


def noises(flow: FlowModule, n: int, seed: int) -> Tensor:
    """`(n, *shape)` noises that depend on (seed, number) alone."""
    index = torch.arange(n, device=flow.device)
    return Draws(seed, 0, index).normal("straightness", tuple(flow.net.shape)) * flow.path.source_std


@torch.no_grad()
def follow(flow: FlowModule, x0: Tensor, steps: int) -> Paths:
    """Euler paths from `x0` `(n, *shape)`, with classes in turn."""
    cond = torch.arange(len(x0), device=x0.device) % flow.num_classes if flow.num_classes else None
    training = flow.training
    flow.eval()
    states = flow.integrate(x0, steps, cond=cond, solver=Euler(), trajectory=True).trajectory
    flow.train(training)
    velocity = (states[1:] - states[:-1]) * steps
    residual = (states[-1] - states[0]) - velocity
    return Paths(states.cpu(), residual.flatten(2).square().sum(2).mean(1).cpu())


def draw_deviation(flows: dict[str, Paths]) -> Figure:
    """`E |Z_1 - Z_0 - v(Z_t, t)|^2` over t; the area under a line is S."""
    figure = Figure(figsize=(5, 3.5), dpi=110)
    axes = figure.add_subplot()
    for name, paths in flows.items():
        t = torch.arange(len(paths.deviation)) / len(paths.deviation)
        axes.plot(t, paths.deviation, label=f"{name}: S = {paths.deviation.mean():.3g}")
    axes.set(xlabel="t (0 noise, 1 data)", ylabel="E |Z1 - Z0 - v(Zt, t)|²", ylim=(0, None))
    axes.legend()
    return figure


def draw_paths(flows: dict[str, Paths]) -> Figure:
    """Paths of points `(n, 2)`, one panel a flow on the same axes: rings at t = 0, red points at t = 1."""
    figure = Figure(figsize=(5 * len(flows), 5.4), dpi=110)
    panels = figure.subplots(1, len(flows), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, paths) in zip(panels, flows.items()):
        x, y = paths.states[:, :SHOWN].permute(2, 0, 1)
        axes.plot(x, y, color="tab:blue", linewidth=0.9, alpha=0.7)
        axes.scatter(x[0], y[0], s=12, facecolor="white", edgecolor="tab:gray", zorder=3, label="t = 0 (source)")
        axes.scatter(x[-1], y[-1], s=10, color="tab:red", zorder=4, label="t = 1 (data)")
        axes.set_title(f"{name}: S = {paths.deviation.mean():.3g}")
        axes.set_aspect("equal", adjustable="box")
        axes.set_xlabel(" ")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    return figure
