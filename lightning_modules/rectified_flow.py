"""Rectified flow: "Flow Straight and Fast" (arXiv 2209.03003)."""

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.ranks import all_rows
from penstock.lightning_modules.flow.couplings import Coupling, Independent
from penstock.lightning_modules.flow.losses import FlowLoss, SquaredError, flow_matching_loss
from penstock.lightning_modules.flow.paths import Path
from penstock.lightning_modules.flow.solvers import Solver
from penstock.lightning_modules.flow.times import TimeSampler, Uniform
from penstock.lightning_modules.flow_module import FlowModule, Key


class RectifiedFlow(FlowModule):
    """Learns `dZ = v(Z, t) dt` that carries the source (t = 0) to the data (t = 1), arXiv 2209.03003.

    Training, eq. 1: `E |(X1 - X0) - v(X_t, t)|^2` with `X_t = t X1 + (1 - t) X0`; with another `path` the target is
    that path's derivative (section 2.2). A batch that holds `source` trains on its pairs: two data sets for transfer
    (section 5.3; `decode` carries source to data, `encode` data to source), or noise and the samples that an earlier
    flow made of it for reflow and distillation (sections 2.1 and 2.3). Sampling is eq. 2 from t = 0 to 1.

    Args:
        net: `net(x, t, cond)` -> velocity.
        optimizer: Makes the optimiser from the parameters.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        path: Interpolation path; None is the straight line.
        times: Law of t in training; None is uniform on (eps, 1), `Fixed(eps)` distils to one step, `Grid(k)` to k.
        coupling: Pairs noise and data inside a batch, that of all ranks; None pairs at random.
        loss: What a prediction costs; None is the squared error, mean over dimensions.
        solver: ODE (or SDE) solver of `sample`; None is Euler.
        eps: Smallest time at which the network is asked, in (0, 1).
        condition_dropout: Share of training samples whose class is dropped, so that guidance is possible, in [0, 1].
        guidance: Scale of classifier-free guidance when sampling; 1 is the plain conditional flow.
        key: Entry of the batch that holds the data.
        initial: Checkpoint whose raw (not averaged) weights training starts from; None keeps the network's own.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        path: Path | None = None,
        times: TimeSampler | None = None,
        coupling: Coupling | None = None,
        loss: FlowLoss | None = None,
        solver: Solver | None = None,
        eps: float = 1e-3,
        condition_dropout: float = 0.1,
        guidance: float = 1.0,
        key: Key = "image",
        initial: str | None = None,
    ):
        super().__init__(net, optimizer, scheduler, path, solver, eps, guidance, key, initial)
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout={condition_dropout}: expected a share in [0, 1]")
        self.times = times or Uniform(eps)
        self.coupling = coupling or Independent()
        self.loss = loss or SquaredError()
        self.condition_dropout = condition_dropout

    def precheck(self, data: Any) -> None:
        super().precheck(data)
        self.loss.prepare()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict":
            self.loss.prepare()

    def _coupled(self, x0: Tensor, x1: Tensor, draws: Draws) -> Tensor:
        """The noise of each sample, of a plan for the batch of all ranks: each makes the same and takes its rows."""
        (noise, own), (data, _), (index, _) = (all_rows(value) for value in (x0, x1, draws.index))
        everyone = Draws(draws.seed, draws.epoch, index)
        return self.coupling.pair(noise, data, everyone.generator("coupling"))[0][own]

    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """Loss of each sample `(B,)`; noise, times and dropped conditions come from `draws`."""
        x1 = batch[self.key]
        if "source" in batch:
            x0, scalars = batch["source"], draws.uniform("time", (2,))
        else:
            x0, scalars = draws.both(("noise", x1.shape[1:]), ("time", (2,)), x1.dtype)
        if not isinstance(self.coupling, Independent):
            x0 = self._coupled(x0, x1, draws)
        u, dropped = scalars.unbind(1)
        cond = self.condition(batch)
        if cond is not None and self.condition_dropout:
            cond = self.net.drop_condition(cond, dropped < self.condition_dropout)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.net(x, t, cond)

        return flow_matching_loss(velocity, x0, x1, self.times.quantile(u), path=self.path, loss=self.loss)
