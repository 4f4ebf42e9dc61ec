"""Rectified flow: "Flow Straight and Fast" (arXiv 2209.03003)."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow import likelihood
from penstock.lightning_modules.flow.couplings import Coupling, Independent
from penstock.lightning_modules.flow.grids import compressed, uniform
from penstock.lightning_modules.flow.guidance import Guided
from penstock.lightning_modules.flow.losses import Reduction, flow_matching_loss
from penstock.lightning_modules.flow.paths import Linear, Path
from penstock.lightning_modules.flow.solvers import RK45, Euler, Heun, Midpoint, Solver, Velocity
from penstock.lightning_modules.flow.times import TimeSampler, Uniform
from penstock.lightning_modules.flow.transfer import feature_matching_loss
from penstock.lightning_modules.seeds import run_seed


class RectifiedFlow(LightningModule):
    """Learns `dZ = v(Z, t) dt` that carries the source (t = 0) to the data (t = 1), arXiv 2209.03003.

    Training, eq. 1: `E |(X1 - X0) - v(X_t, t)|^2` with `X_t = t X1 + (1 - t) X0`; with another `path` the target is
    that path's derivative (section 2.2). A batch that holds `source` trains a flow between two data sets (section 5.3):
    `decode` carries source to data, `encode` data to source. Sampling is eq. 2 from t = 0 to 1.

    Args:
        net: `net(x, t, cond)` -> velocity.
        optimizer: Makes the optimiser from the parameters.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        path: Interpolation path; None is the straight line.
        times: Law of t in training; None is uniform on (eps, 1).
        coupling: Pairs noise and data inside a batch; None pairs at random.
        solver: ODE (or SDE) solver of `sample`; None is Euler.
        eps: Smallest time at which the network is asked, in (0, 1).
        condition_dropout: Share of training samples whose class is dropped, so that guidance is possible, in [0, 1].
        guidance: Scale of classifier-free guidance when sampling; 1 is the plain conditional flow.
        reduction: Squared error's reduction over a sample's dimensions.
        feature_net: For data-to-data transfer: errors are measured in this network's features (section 5.3).
        key: Entry of the batch that holds the data.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        path: Path | None = None,
        times: TimeSampler | None = None,
        coupling: Coupling | None = None,
        solver: Solver | None = None,
        eps: float = 1e-3,
        condition_dropout: float = 0.1,
        guidance: float = 1.0,
        reduction: Reduction = "mean",
        feature_net: nn.Module | None = None,
        key: Literal["image", "points", "video"] = "image",
    ):
        super().__init__()
        if not 0 < eps < 1:
            raise ValueError(f"eps={eps}: expected a time in (0, 1)")
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout={condition_dropout}: expected a share in [0, 1]")
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.path = path or Linear()
        self.times = times or Uniform(eps)
        self.coupling = coupling or Independent()
        self.solver = solver or Euler()
        self.eps = eps
        self.condition_dropout = condition_dropout
        self.guidance = guidance
        self.reduction = reduction
        self.feature_net = feature_net.eval().requires_grad_(False) if feature_net else None
        self.key = key
        self.num_classes: int = net.num_classes
        self.nfe = 0

    # ------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        shape, classes = tuple(getattr(data, "shape", self.net.shape)), getattr(data, "num_classes", 0)
        if shape != tuple(self.net.shape):
            raise UserError(f"model.net.shape: found {tuple(self.net.shape)}, expected {shape}, the data's shape")
        if self.num_classes not in (0, classes):
            raise UserError(
                f"model.net.num_classes: found {self.num_classes}, expected 0 or {classes}, the data's classes"
            )

    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """Loss of each sample `(B,)`; noise, times and dropped conditions come from `draws`."""
        x1 = batch[self.key]
        x0 = batch["source"] if "source" in batch else draws.normal("noise", x1.shape[1:], x1.dtype)
        if not isinstance(self.coupling, Independent):
            x0, x1, _ = self.coupling.pair(x0, x1, draws.generator("coupling"))
        u, dropped = draws.uniform("time", (2,)).unbind(1)
        t = self.times.quantile(u)
        cond = None
        if self.num_classes:
            cond = batch["label"]
            if self.condition_dropout:
                cond = self.net.drop_condition(cond, dropped < self.condition_dropout)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.net(x, t, cond)

        if self.feature_net is not None:
            return feature_matching_loss(velocity, self.feature_net, x0, x1, t, path=self.path)
        return flow_matching_loss(velocity, x0, x1, t, path=self.path, reduction=self.reduction)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.losses(batch, Draws(run_seed(), self.current_epoch, batch["index"]))
        loss = losses.mean()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.detach(), batch_size=len(losses))
        return loss

    def _evaluate(self, name: str, batch: dict[str, Tensor]) -> None:
        """Logs the mean over samples. Lightning averages the ranks' sizes as integers, which the factor keeps exact."""
        losses = self.losses(batch, Draws(0, 0, batch["index"]))
        weight = len(losses) * self.trainer.world_size
        self.log(name, losses.mean(), batch_size=weight, on_epoch=True, sync_dist=True)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val/loss", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test/loss", batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        n: int,
        *,
        steps: int = 20,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Draws `n` samples `(n, *shape)`.

        Args:
            n: How many.
            steps: Steps of the solver (an adaptive solver chooses its own); `nfe` tells the network calls after it.
            cond: Condition of each sample, `(n,)` class labels, or None for the unconditional flow.
            generator: Source of the starting noise, on the module's device.
            guidance: Guidance scale instead of the module's own.
        """
        x0 = torch.randn(n, *self.net.shape, generator=generator, device=self.device) * self.path.source_std
        return self.decode(x0, steps=steps, cond=cond, generator=generator, guidance=guidance)

    def decode(
        self,
        x0: Tensor,
        *,
        steps: int = 20,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Carries source samples `(B, ...)` at t = 0 to the data at t = 1 (translation from source to data)."""
        return self._integrate(x0, steps, cond, generator, guidance, reverse=False)

    def encode(self, x1: Tensor, *, steps: int = 20, cond: Tensor | None = None) -> Tensor:
        """Carries data `(B, ...)` at t = 1 back to the source at t = 0 (translation from data to source)."""
        return self._integrate(x1, steps, cond, None, 1.0, reverse=True)

    def _integrate(
        self,
        x: Tensor,
        steps: int,
        cond: Tensor | None,
        generator: torch.Generator | None,
        guidance: float | None,
        reverse: bool,
    ) -> Tensor:
        scale = self.guidance if guidance is None else guidance
        velocity: Velocity
        velocity = guided = Guided(self.net, cond, scale if cond is not None else 1.0)
        if isinstance(self.path, Linear) and isinstance(self.solver, Euler | Heun | Midpoint):
            velocity, grid = compressed(guided, self.eps), uniform(steps)
        else:
            low, high = self.path.t_range
            grid = uniform(steps, max(low, self.eps), high)
        grid = grid.flip(0) if reverse else grid
        solution = self.solver(velocity, x, grid, path=self.path, generator=generator)
        self.nfe = guided.nfe
        return solution.x

    def log_prob(
        self,
        x: Tensor,
        *,
        cond: Tensor | None = None,
        solver: Solver | None = None,
        steps: int = 100,
        trace: Literal["exact", "hutchinson"] = "hutchinson",
        generator: torch.Generator | None = None,
        epsilon: Tensor | None = None,
    ) -> Tensor:
        """Log-density of data `(B, ...)` in nats `(B,)`, by the instantaneous change of variables from t = 1 to 1e-5.

        Args:
            x: Data.
            cond: Condition of each sample.
            solver: Plain ODE solver; None is RK45.
            steps: Steps of a fixed-step solver.
            trace: Exact divergence (a backward pass per dimension) or Hutchinson's estimate.
            generator: Source of Hutchinson's probe.
            epsilon: The probe itself, shape of `x`.
        """
        result = likelihood.log_prob(
            Guided(self.net, cond),
            x,
            uniform(steps, min(1e-5, self.eps), self.path.t_range[1]).flip(0),
            solver=solver or RK45(),
            trace=trace,
            generator=generator,
            epsilon=epsilon,
            path=self.path,
        )
        self.nfe = result.nfe
        return result.log_prob

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Under `key`: the batch's `source` carried to the data, or one sample for each label of the batch."""
        draws = Draws(run_seed(), 0, batch["index"])
        x0 = batch["source"] if "source" in batch else draws.normal("predict", self.net.shape) * self.path.source_std
        cond = batch["label"] if self.num_classes else None
        result = {"index": batch["index"], self.key: self.decode(x0, steps=100, cond=cond)}
        return result | ({"label": cond} if cond is not None else {}) | {k: batch[k] for k in ("source",) if k in batch}
