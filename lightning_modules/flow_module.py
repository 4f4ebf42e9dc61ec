"""What all methods that train a velocity share: steps, weights to start from, sampling, encoding, likelihood."""

from abc import abstractmethod
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.bellman import sampling_grid
from penstock.lightning_modules.flow import likelihood
from penstock.lightning_modules.flow.grids import compressed, uniform
from penstock.lightning_modules.flow.guidance import Guided
from penstock.lightning_modules.flow.paths import Linear, Path
from penstock.lightning_modules.flow.solvers import RK45, Euler, Heun, Midpoint, Solution, Solver, Velocity
from penstock.lightning_modules.seeds import run_seed
from penstock.lightning_modules.steps import Bellman, parse_steps
from penstock.lightning_modules.training import check_data, log_mean, net_weights, optimizers, start_from_initial

Key = Literal["image", "points", "video", "latent"]


class FlowModule(LightningModule):
    """A network `v(x, t, cond)` that carries the source (t = 0) to the data (t = 1) by `dx = v dt`.

    A method sits directly on this class, implements `losses`, and names all its arguments.

    Args:
        net: `net(x, t, cond)` -> velocity.
        optimizer: Makes the optimiser from the parameters.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        path: Interpolation path; None is the straight line.
        solver: ODE (or SDE) solver of `sample`; None is Euler.
        eps: Smallest time at which the network is asked, in [0, 1).
        guidance: Scale of classifier-free guidance when sampling; 1 is the plain conditional flow.
        key: Entry of the batch that holds the data.
        initial: Checkpoint whose raw (not averaged) weights training starts from; None keeps the network's own. The
            command line clears it for a run that resumes.

    Attributes:
        default_steps: Steps of `sample` where nothing else is asked for.
        predict_steps: Steps of `predict_step`.
    """

    default_steps: int = 20
    predict_steps: int = 100

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        path: Path | None,
        solver: Solver | None,
        eps: float,
        guidance: float,
        key: Key,
        initial: str | None,
    ):
        super().__init__()
        if not 0 <= eps < 1:
            raise ValueError(f"eps={eps}: expected a time in [0, 1)")
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.path = path or Linear()
        self.solver = solver or Euler()
        self.eps = eps
        self.guidance = guidance
        self.key = key
        self.initial = initial
        self.num_classes: int = net.num_classes
        self.nfe = 0

    # ------------------------------------------------------------------ training

    @abstractmethod
    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """Loss of each sample `(B,)`; all randomness comes from `draws`."""

    def fits(self, data: Any) -> None:
        """Refuses a DataModule of other shape or classes.

        Raises:
            UserError: the key of the model, what was found and what is expected.
        """
        check_data(self.net, self.num_classes, data)

    def precheck(self, data: Any) -> None:
        """Called before `data` is prepared, which may take long: refuses early what `setup` would refuse later.

        Raises:
            UserError: what is found and what is expected.
        """
        start_from_initial(self)

    def setup(self, stage: str) -> None:
        self.fits(self.trainer.datamodule)
        if stage == "fit":
            start_from_initial(self)

    def initial_weights(self, state: dict[str, Any]) -> dict[str, Any]:
        """The network's weights under its own names, from the state of the module that training starts from."""
        return net_weights(state)

    def condition(self, batch: dict[str, Tensor]) -> Tensor | None:
        """What the network is conditioned on, or None."""
        return batch["label"] if self.num_classes else None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.losses(batch, Draws(run_seed(), self.current_epoch, batch["index"]))
        loss = losses.mean()
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.detach(), batch_size=len(losses))
        return loss

    def score(self, name: str, batch: dict[str, Tensor]) -> None:
        """Logs the loss of a batch of validation or test under a name."""
        log_mean(self, name, self.losses(batch, Draws(0, 0, batch["index"])))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.score("val/loss", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.score("test/loss", batch)

    def configure_optimizers(self) -> Any:
        return optimizers(self)

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        n: int,
        *,
        steps: int | str | None = None,
        grid: Tensor | None = None,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Draws `n` samples `(n, *shape)`.

        Args:
            n: How many.
            steps: Steps of the solver (an adaptive solver chooses its own), or `bellman:K`, the K steps of least local
                error for the present weights; None is `default_steps`. `nfe` tells the network calls after it.
            grid: Times from 0 to 1 to step through instead of `steps` equal ones.
            cond: Condition of each sample, `(n,)` class labels, or None for the unconditional flow.
            generator: Source of the starting noise, on the module's device.
            guidance: Guidance scale instead of the module's own.
        """
        x0 = torch.randn(n, *self.net.shape, generator=generator, device=self.device) * self.path.source_std
        return self.decode(x0, steps=steps, grid=grid, cond=cond, generator=generator, guidance=guidance)

    def decode(
        self,
        x0: Tensor,
        *,
        steps: int | str | None = None,
        grid: Tensor | None = None,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """Carries source samples `(B, ...)` at t = 0 to the data at t = 1 (translation from source to data)."""
        scale = self.guidance if guidance is None else guidance
        number = parse_steps(self.default_steps if steps is None else steps)
        grid = self.grid_of(number, scale) if grid is None else grid
        equal = number if isinstance(number, int) else number.k
        return self.integrate(x0, equal, grid=grid, cond=cond, generator=generator, guidance=scale).x

    def grid_of(self, steps: int | Bellman, guidance: float) -> Tensor | None:
        """The times to step through, or None for equal steps; a search for the best ones is kept in memory."""
        return sampling_grid(self, steps, guidance) if isinstance(steps, Bellman) else None

    def encode(
        self, x1: Tensor, *, steps: int = 20, cond: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Carries data `(B, ...)` at t = 1 back to the source at t = 0 (translation from data to source)."""
        return self.integrate(x1, steps, cond=cond, generator=generator, reverse=True).x

    def integrate(
        self,
        x: Tensor,
        steps: int = 20,
        *,
        grid: Tensor | None = None,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        guidance: float = 1.0,
        solver: Solver | None = None,
        reverse: bool = False,
        trajectory: bool = False,
    ) -> Solution:
        """Follows the flow of `x` `(B, ...)` from t = 0 to 1, or back where `reverse`.

        On the straight line Euler, Heun and midpoint step through [0, 1] while the network sees times in [eps, 1), as
        the official sampler does; a solver with ends of its own gets the whole grid; every other pair of path and
        solver keeps inside the path's range.

        Args:
            x: States at t = 0 (at t = 1 where `reverse`).
            steps: Number of equal steps.
            grid: Ascending times from 0 to 1 instead.
            cond: Condition of each sample.
            generator: Source of randomness of a stochastic solver.
            guidance: Guidance scale.
            solver: Instead of the module's own.
            reverse: From data to noise.
            trajectory: Keep the states at all times of the grid.
        """
        solver = solver or self.solver
        velocity: Velocity
        velocity = guided = Guided(self.net, cond, guidance if cond is not None else 1.0)
        if solver.own_ends:
            grid = uniform(steps) if grid is None else grid
        elif isinstance(self.path, Linear) and isinstance(solver, Euler | Heun | Midpoint):
            velocity, grid = compressed(guided, self.eps), uniform(steps) if grid is None else grid
        else:
            low, high = max(self.path.t_range[0], self.eps), self.path.t_range[1]
            grid = uniform(steps, low, high) if grid is None else grid.clamp(low, high)
        solution = solver(
            velocity,
            x,
            grid.flip(0) if reverse else grid,
            path=self.path,
            generator=generator,
            trajectory=trajectory,
        )
        self.nfe = guided.nfe
        return solution

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
        """Under `key`: the batch's `source` carried to the data, or one sample for each condition of the batch."""
        draws = Draws(run_seed(), 0, batch["index"])
        x0 = batch["source"] if "source" in batch else draws.normal("predict", self.net.shape) * self.path.source_std
        cond = self.condition(batch)
        result = {"index": batch["index"], self.key: self.decode(x0, steps=self.predict_steps, cond=cond)}
        return result | ({"label": cond} if cond is not None else {}) | {k: batch[k] for k in ("source",) if k in batch}
