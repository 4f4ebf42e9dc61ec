"""InstaFlow: "One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation" (arXiv 2309.06380)."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.guidance import Guided
from penstock.lightning_modules.flow.losses import FlowLoss, Regression, SquaredError
from penstock.lightning_modules.flow.solvers import Solution, Solver
from penstock.lightning_modules.flow.times import TimeSampler, Uniform
from penstock.lightning_modules.flow_module import FlowModule
from penstock.lightning_modules.nets.autoencoder import Autoencoder, Identity
from penstock.lightning_modules.nets.text_encoder import HashedText, TextEncoder
from penstock.lightning_modules.prompted import Condition, Prompted
from penstock.lightning_modules.seeds import run_seed
from penstock.lightning_modules.steps import parse_steps


class InstaFlow(FlowModule):
    """A rectified flow from noise (t = 0) to images (t = 1) that a prompt steers, in pixel or latent space.

    Training (section 2): `E |(X1 - X0) - v(X_t, t | T)|^2` with `X_t = t X1 + (1 - t) X0`. On images with captions and
    fresh noise that is the first flow; on pairs of noise and what a guided teacher made of it for a prompt T, reflow;
    on pairs with `times=Fixed(0)`, distillation to the one step `X1 = X0 + v(X0, 0 | T)`, first in latent space, then
    (`space=image`) by a perceptual loss between decoded images. That these are compared decoded is our reading: the
    paper names the loss only.

    A batch holds `text` (prompts) or `label` (numbers of `prompts`), and `image`, or `source` with `image` or `latent`.

    Sampling (official sampler): times 0, 1/N, ..., for Stable Diffusion's U-Net 1000, 1000 (1 - 1/N), ...; guidance
    acts above 1 only, so that 0 and 1 both are one conditional pass. The prompt encoder and the autoencoder are frozen,
    and in no checkpoint or average.

    Args:
        net: `net(x, t, cond)` -> velocity; `cond` `(B, L, E)` are features of prompts.
        optimizer: Makes the optimiser from the parameters.
        scheduler: Makes a learning-rate scheduler that is stepped after every optimiser step.
        text: Prompts to features; None is the embedded `HashedText`.
        autoencoder: Images to the flow's space and back; None is pixel space.
        prompts: Prompts by number, for samples that ask for a class.
        times: Law of t in training; None is uniform on (0, 1), `Fixed(0)` distils to one step.
        loss: What a prediction costs; None is the squared error, mean over dimensions.
        space: Where the loss is taken: of the velocity, or of decoded images `X0 + v` and `X1` (with `Fixed(0)`).
        solver: ODE solver of `sample`; None is Euler.
        condition_dropout: Share of training samples whose prompt is dropped, in [0, 1]; 0 on pairs, whose samples have
            the teacher's guidance in them.
        guidance: Scale of classifier-free guidance when sampling.
        initial: Checkpoint whose raw (not averaged) weights training starts from; None keeps the network's own.

    Raises:
        ValueError: `condition_dropout` outside [0, 1].
    """

    takes_text = True
    predict_steps = 25

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        text: TextEncoder | None = None,
        autoencoder: Autoencoder | None = None,
        prompts: list[str] | None = None,
        times: TimeSampler | None = None,
        loss: FlowLoss | None = None,
        space: Literal["velocity", "image"] = "velocity",
        solver: Solver | None = None,
        condition_dropout: float = 0.0,
        guidance: float = 1.0,
        initial: str | None = None,
    ):
        autoencoder = autoencoder or Identity()
        super().__init__(net, optimizer, scheduler, None, solver, 0.0, guidance, autoencoder.key, initial)
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout={condition_dropout}: expected a share in [0, 1]")
        self.autoencoder = autoencoder
        self.prompted = Prompted(text or HashedText(), autoencoder, prompts or [])
        self.num_classes = len(self.prompted.prompts)
        self.times = times or Uniform(0.0)
        self.loss = loss or SquaredError()
        self.space = space
        self.condition_dropout = condition_dropout

    # ------------------------------------------------------------------ training

    def fits(self, data: Any) -> None:
        self.prompted.fits(self.net, data)

    def precheck(self, data: Any) -> None:
        super().precheck(data)
        self.loss.prepare()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "predict":
            self.loss.prepare()

    def features(self, condition: Condition | None) -> Tensor | None:
        """Features `(B, L, E)` of prompts, of numbers `(B,)` of `prompts`, or those given; None stays None."""
        return self.prompted.features(condition, self.device)

    def condition(self, batch: dict[str, Any]) -> Tensor | None:
        return self.prompted.condition(batch, self.device)

    def losses(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """Loss of each sample `(B,)`; noise, times and dropped prompts come from `draws`.

        Prompts pass the network's `drop_condition` even where none is dropped: DDP wants its gradient.
        """
        shape = tuple(self.net.shape)
        x1 = self.prompted.data(batch, draws)
        if "source" in batch:
            x0, scalars = batch["source"], draws.uniform("time", (2,))
        else:
            x0, scalars = draws.both(("noise", shape), ("time", (2,)), x1.dtype)
        u, dropped = scalars.unbind(1)
        cond = self.net.drop_condition(self.condition(batch), dropped < self.condition_dropout)
        t = self.times.quantile(u)
        x_t = self.path.interpolate(x0, x1, t)
        velocity, target = self.net(x_t, t, cond), x1 - x0
        if self.space == "velocity":
            return self.loss(Regression(velocity, target, x_t, x0, x1, t))
        with torch.no_grad():
            image = self.autoencoder.decode(x1)
        made, black = self.autoencoder.decode(x0 + velocity), torch.zeros_like(image)
        return self.loss(Regression(made, image, black, black, image, t))

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        n: int,
        *,
        steps: int | str | None = None,
        grid: Tensor | None = None,
        cond: Condition | None = None,
        generator: torch.Generator | None = None,
        guidance: float | None = None,
        prompt: str | None = None,
        negative: str | None = None,
    ) -> Tensor:
        """Draws `n` images `(n, C, H, W)` in [-1, 1].

        Args:
            n: How many.
            steps: Steps N of the solver, or `bellman:N`; None is `default_steps`.
            grid: Times from 0 to 1 to step through instead.
            cond: Prompt of each sample: texts, int64 numbers of `prompts`, or features `(n, L, E)`; None is no prompt.
            generator: Source of the starting noise, on the module's device.
            guidance: Guidance scale instead of the module's own; it acts above 1.
            prompt: One prompt for all samples, instead of `cond`.
            negative: Prompt that guidance leads away from, instead of the empty one.

        Raises:
            UserError: another number of prompts than samples.
        """
        cond = [prompt] * n if prompt is not None else cond
        if cond is not None and len(cond) != n:
            raise UserError(f"sample: {len(cond)} prompts given for {n} samples, expected one each")
        x0 = torch.randn(n, *self.net.shape, generator=generator, device=self.device)
        scale = self.guidance if guidance is None else guidance
        number = parse_steps(self.default_steps if steps is None else steps)
        grid = self.grid_of(number, scale) if grid is None else grid
        equal = number if isinstance(number, int) else number.k
        options = {"grid": grid, "cond": cond, "generator": generator, "guidance": scale, "negative": negative}
        return self.autoencoder.decode(self.integrate(x0, equal, **options).x)

    def integrate(
        self,
        x: Tensor,
        steps: int = 1,
        *,
        grid: Tensor | None = None,
        cond: Condition | None = None,
        generator: torch.Generator | None = None,
        guidance: float = 1.0,
        solver: Solver | None = None,
        reverse: bool = False,
        trajectory: bool = False,
        negative: str | None = None,
    ) -> Solution:
        """Follows the flow of `x` `(B, *net.shape)` from t = 0 to 1, or back where `reverse`; see `FlowModule`.

        Without `grid` the times are the network's own where it has any (`net.times(steps)`). If they begin at
        t_min > 0, `x` stands for a state of unit variance there, as in the diffusion that the network was trained as.
        """
        cond = self.features(cond)
        weak = None if negative is None else self.features([negative] * len(x))
        guided = Guided(
            self.net,
            cond,
            guidance if cond is not None and guidance > 1 else 1.0,
            weak=None if weak is None else lambda x, t, _: self.net(x, t, weak),
        )
        first = 1.0
        if grid is None:
            grid = self.net.times(steps) if hasattr(self.net, "times") else uniform(steps)
            first = float(torch.hypot(grid[0], 1 - grid[0]))
        solution = (solver or self.solver)(
            guided,
            x if reverse else x * first,
            grid.flip(0) if reverse else grid,
            path=self.path,
            generator=generator,
            trajectory=trajectory,
        )
        self.nfe = guided.nfe
        return Solution(solution.x / first, solution.nfe, solution.trajectory) if reverse else solution

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One image for each prompt of the batch, in `predict_steps` from the batch's `source` or from keyed noise."""
        draws = Draws(run_seed(), 0, batch["index"])
        x0 = batch["source"] if "source" in batch else draws.normal("predict", tuple(self.net.shape))
        solution = self.integrate(x0, self.predict_steps, cond=self.condition(batch), guidance=self.guidance)
        labels = {"label": batch["label"]} if "label" in batch else {}
        return {"index": batch["index"], "image": self.autoencoder.decode(solution.x), **labels}
