"""Muon: matrices move along the orthogonal factor of their momentum, all else as AdamW has it."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """`W -= lr (weight_decay W + 0.2 sqrt(max(n, m)) O)` for matrices `W` `(n, m)`; AdamW for all other parameters.

    O is the orthogonal factor of `(1 - momentum) g + momentum M` with `M = momentum M + (1 - momentum) g`; its factor
    gives an update the size of AdamW's, so that learning rates carry over (K. Jordan 2024; arXiv 2502.16982 eq. 4).

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of both.
        momentum: Of the matrices, in [0, 1).
        iterations: Of Newton and Schulz, see `orthogonal`.
        least: A matrix has at least so many rows and columns; smaller ones, such as what reads or writes a few
            channels, are AdamW's.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        iterations: int = 5,
        least: int = 48,
    ):
        if not 0 <= momentum < 1 or iterations < 1 or least < 1:
            raise ValueError(
                f"momentum={momentum}, iterations={iterations}, least={least}: expected a momentum in [0, 1), and "
                "whole numbers from 1 on"
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.momentum, self.iterations, self.least = momentum, iterations, least

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [self._move(group) for group in self.param_groups]
        super().step()
        for weights in held:
            for weight, grad in weights:
                weight.grad = grad
        return loss

    def _move(self, group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Updates the matrices of a group; takes their gradients from them and returns both."""
        alike, held = defaultdict(list), []
        for weight in group["params"]:
            if weight.grad is None or weight.ndim != 2 or min(weight.shape) < self.least:
                continue
            state = self.state[weight]
            if not state:
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight)}
            state["step"] += 1
            mean = state["exp_avg"].lerp_(weight.grad, 1 - self.momentum)
            alike[weight.shape, weight.device, weight.dtype].append((weight, weight.grad.lerp(mean, self.momentum)))
            held.append((weight, weight.grad))
            weight.grad = None
        for (shape, *_), pairs in alike.items():
            weights, updates = zip(*pairs)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            found = orthogonal(torch.stack(updates), self.iterations).to(weights[0].dtype).unbind()
            torch._foreach_add_(weights, found, alpha=-0.2 * group["lr"] * max(shape) ** 0.5)
        return held


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Roughly U V' of matrices `(B, n, m)` = U S V', with singular values of 0.7 to 1.2: Newton-Schulz of fifth order.

    Args:
        matrices: On a GPU they are worked on in bfloat16.
        iterations: Five bring singular values of more than 1e-2 of the norm near 1.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
