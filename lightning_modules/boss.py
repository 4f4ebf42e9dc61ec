"""BOSS: "Bellman Optimal Stepsize Straightening of Flow-Matching Models" (arXiv 2312.16414)."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.bellman import search
from penstock.lightning_modules.bellman_plots import draw_costs, draw_step_sizes
from penstock.lightning_modules.callbacks.pictures import keep_picture
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.bellman import straightening_loss
from penstock.lightning_modules.flow.grids import compressed
from penstock.lightning_modules.flow.grids import uniform as uniform_grid
from penstock.lightning_modules.flow.guidance import Guided
from penstock.lightning_modules.flow.solvers import Solver
from penstock.lightning_modules.flow_module import FlowModule, Key
from penstock.lightning_modules.nets import lora
from penstock.lightning_modules.steps import Bellman, parse_steps


class BOSS(FlowModule):
    """Straightens a trained flow between the K + 1 times of one schedule; t = 0 is noise, t = 1 data.

    Training, eq. 9: `E |v(x_r, tau_r) - (x_{r+1} - x_r) / (tau_{r+1} - tau_r)|^2`, where `x_r` is the state at `tau_r`
    of the teacher's fine Euler trajectory (the batch's `states`) and each sample draws one segment r. The network sees
    `eps + (1 - eps) tau_r`. Where the loss is 0, K Euler steps end where the teacher's K_max do.

    `sample` takes these K steps; the times come from the data, are a buffer of the checkpoint, and belong to the
    weights. Another number of steps is equal ones, or those that `bellman:N` finds for the present weights.

    Args:
        net: `net(x, t, cond)` -> velocity.
        optimizer: Makes the optimiser from the parameters that train.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        k: K, the number of segments that the data hold and of network calls per sample, at least 1.
        solver: Solver of `sample` on the schedule; None is Euler, which the loss is made for.
        eps: Smallest time at which the network is asked, in [0, 1).
        key: Entry of the batch that holds the data.
        initial: Checkpoint whose raw (not averaged) weights training starts from; None keeps the network's own.
        lora_rank: 0 trains all weights; r trains low-rank parts of that rank only (arXiv 2106.09685, see `nets.lora`).
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        k: int = 4,
        solver: Solver | None = None,
        eps: float = 1e-3,
        key: Key = "image",
        initial: str | None = None,
        lora_rank: int = 0,
    ):
        super().__init__(net, optimizer, scheduler, None, solver, eps, 1.0, key, initial)
        if k < 1:
            raise ValueError(f"k={k}: expected 1 step or more")
        if lora_rank:
            lora.adapt(net, lora_rank)
        self.lora_rank = lora_rank
        self.k = self.default_steps = self.predict_steps = k
        self.register_buffer("grid", uniform_grid(k))

    def initial_weights(self, state: dict[str, Any]) -> dict[str, Any]:
        own = super().initial_weights(state)
        return lora.base_state(self.net, own) if self.lora_rank else own

    # ------------------------------------------------------------------ training

    def precheck(self, data: Any) -> None:
        super().precheck(data)
        keep = str(getattr(data, "keep", None))
        if keep.startswith("bellman:") and isinstance(kept := parse_steps(keep), Bellman) and kept.k != self.k:
            raise UserError(f"model.k: found {self.k}, expected {kept.k}, the segments of data.keep={keep}")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "predict":
            return
        times = getattr(self.trainer.datamodule, "times", None)
        if times is None:
            raise UserError("data: holds no states of a teacher's trajectory; expected pairs with keep=bellman:K")
        if len(times) != self.k + 1:
            raise UserError(f"model.k: found {self.k}, expected {len(times) - 1}, the segments that data.keep keeps")
        if stage == "fit":
            self.grid = torch.as_tensor(times, dtype=torch.float64, device=self.grid.device)

    def _check_grid(self) -> None:
        """Refuses data on other times than those that the weights of a checkpoint belong to."""
        times = list(self.trainer.datamodule.times)
        if self.grid.tolist() != times:
            found, own = ([round(t, 4) for t in grid] for grid in (times, self.grid.tolist()))
            raise UserError(f"data.keep: states at the times {found}, expected {own}, those of the checkpoint")

    def on_fit_start(self) -> None:
        self._check_grid()
        self._draw()

    def on_validation_start(self) -> None:
        self._check_grid()

    on_test_start = on_validation_start

    def losses(self, batch: dict[str, Tensor], draws: Draws) -> Tensor:
        """Loss of each sample `(B,)`, on one of its segments."""
        return self.segment_losses(batch, (draws.uniform("segment") * self.k).long().clamp(max=self.k - 1))

    def segment_losses(self, batch: dict[str, Tensor], r: Tensor) -> Tensor:
        """Loss of each sample `(B,)` on its segment `r` `(B,)`, 0 to K - 1: eq. 9 without its sums."""
        states = batch["states"]
        rows = torch.arange(len(r), device=r.device)
        x, y = states[rows, r], states[rows, r + 1]
        t, s = (self.grid[i].to(torch.promote_types(x.dtype, torch.float32)) for i in (r, r + 1))
        velocity = compressed(Guided(self.net, self.condition(batch)), self.eps)
        return straightening_loss(velocity, x, y, t, s)

    def score(self, name: str, batch: dict[str, Tensor]) -> None:
        """Logs `<name>_interval_<r>`, the loss of each segment over all samples, and `name`, their mean."""
        size, device = batch["states"].shape[0], batch["states"].device
        losses = [self.segment_losses(batch, torch.full((size,), r, device=device)).mean() for r in range(self.k)]
        values = {name: torch.stack(losses).mean()} | {f"{name}_interval_{r}": loss for r, loss in enumerate(losses)}
        self.log_dict(values, batch_size=size * self.trainer.world_size, on_epoch=True, sync_dist=True)

    @rank_zero_only
    def _draw(self) -> None:
        """Leaves pictures of the search that the schedule comes from."""
        data = self.trainer.datamodule
        searched = str(getattr(data, "keep", "")).startswith("bellman") and data.teacher is not None
        if not searched or self.trainer.fast_dev_run:
            return
        options = {"k_max": data.recipe.steps, "guidance": data.recipe.guidance, "device": self.device}
        found = search(data.teacher, **options)
        keep_picture(self.trainer, draw_costs(found, self.k), "cost_matrix", "bellman/cost_matrix")
        keep_picture(self.trainer, draw_step_sizes(found), "step_sizes", "bellman/step_sizes")

    # ------------------------------------------------------------------ sampling

    def grid_of(self, steps: int | Bellman, guidance: float) -> Tensor | None:
        return self.grid.cpu() if steps == self.k else super().grid_of(steps, guidance)
