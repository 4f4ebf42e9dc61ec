"""Flow-score matching: a denoiser learns a flow's score from the flow's own backward pass (arXiv 2511.20462)."""

from typing import Any

import torch
from torch import Tensor


class ScoreMatching:
    """`mean((d - t)^2)` with `t = weight * (numel * dL/dx)`, for a loss L that is a mean over samples and dimensions.

    `numel dL/dx` is minus the score where L is a negative log-likelihood. The target is known when the backward pass of
    L reaches the flow's input x, and the gradient of the denoiser's output d is made there: one backward pass serves
    both. What the loss is multiplied by before the pass (accumulation, loss scaling) counts for d once, as well.

        x = matching.enter(x, d)      # between the noisy data and the flow
        loss = matching.leave(loss)   # before it is given back; needs the gradient of L with respect to x alone

    Args:
        weight: Of the target.

    Attributes:
        loss: Its value, a number on the device, after the backward pass.
    """

    def __init__(self, weight: float):
        self.weight, self.loss = weight, torch.tensor(torch.nan)
        self._factor: Tensor | None = None

    def enter(self, x: Tensor, d: Tensor) -> Tensor:
        """`x` itself; d, of the same shape, gets its gradient from what comes back here."""
        return _Match.apply(x, d, self)

    def leave(self, loss: Tensor) -> Tensor:
        """`loss` itself, a number whose factor in the backward pass is kept."""
        loss.register_hook(self._seen)
        return loss

    def apart(self, loss: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """The matching loss by a backward pass of its own, where more than `loss` reaches x in the step's."""
        (slope,) = torch.autograd.grad(loss, x, retain_graph=True)
        error = (d.to(slope.dtype) - self.weight * d.numel() * slope).square().mean()
        self.loss = error.detach()
        return error

    def matched(self, d: Tensor, slope: Tensor) -> Tensor:
        """Gradient of the matching loss with respect to d, for the gradient that reached x."""
        numel = d.numel()
        error = d.to(slope.dtype) - self.weight * numel / self._factor * slope
        self.loss = error.square().mean()
        return (self._factor * 2 / numel * error).to(d.dtype)

    def _seen(self, factor: Tensor) -> None:
        self._factor = factor


class _Match(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, matching: ScoreMatching) -> Tensor:
        ctx.save_for_backward(d)
        ctx.matching = matching
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor, None]:
        (d,) = ctx.saved_tensors
        return None, ctx.matching.matched(d, slope), None
