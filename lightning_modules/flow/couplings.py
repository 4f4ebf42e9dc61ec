"""Which noise goes with which data sample of a batch (t = 0 noise, t = 1 data).

Data keep their order, so that labels and indices stay aligned: a coupling only rearranges the noise.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Coupling(ABC):
    """A joint law of a batch of noise and a batch of data."""

    @abstractmethod
    def pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs the rows of a batch.

        Args:
            x0: source samples `(B, ...)`, at t = 0.
            x1: data `(B, ...)`, at t = 1.
            generator: source of randomness, on any device, where the coupling draws.

        Returns:
            `(x0[index], x1, index)`: the rearranged source, the data as they came, and `index` int64 `(B,)`.

        Raises:
            ValueError: batches of different sizes or features.
        """


@dataclass(frozen=True)
class Independent(Coupling):
    """The product law: rows stay where they are."""

    def pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        _check(x0, x1)
        return x0, x1, torch.arange(len(x1), device=x1.device)


@dataclass(frozen=True)
class MinibatchOT(Coupling):
    """Optimal transport inside a batch for the cost `|x0 - x1|^2` (arXiv 2302.00482 section 4.2, arXiv 2304.14772).

    Plans are computed by POT on the CPU in float64. POT is imported with the first of them: that takes a second.

    Args:
        reg: None for the exact plan, a permutation; otherwise the entropic regularisation in units of the mean cost of
            the batch, and for every data sample one source sample is drawn from its column of the Sinkhorn plan (a
            source sample can then occur more than once).
    """

    reg: float | None = None

    def __post_init__(self):
        if self.reg is not None and self.reg <= 0:
            raise ValueError(f"MinibatchOT.reg must be positive or null for the exact plan, got {self.reg}")

    def pair(self, x0: Tensor, x1: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        _check(x0, x1)
        if len(x1) == 0:
            return x0, x1, torch.arange(0, device=x1.device)
        import ot

        cost = torch.cdist(x0.detach().double().flatten(1).cpu(), x1.detach().double().flatten(1).cpu()).square()
        weight = torch.full((len(x1),), 1 / len(x1), dtype=torch.float64)
        if self.reg is None:
            index = torch.from_numpy(ot.emd(weight.numpy(), weight.numpy(), cost.numpy())).argmax(0)
        else:
            reg = self.reg * float(cost.mean())
            plan = ot.sinkhorn(weight.numpy(), weight.numpy(), cost.numpy(), reg, method="sinkhorn_log")
            index = _draw_rows(torch.from_numpy(plan), generator)
        index = index.to(x0.device)
        return x0[index], x1, index.to(x1.device)


def _draw_rows(plan: Tensor, generator: torch.Generator | None) -> Tensor:
    """One row number for each column of `plan` `(B, B)`, with probabilities proportional to the column."""
    device = generator.device if generator is not None else "cpu"
    u = torch.rand(plan.shape[1], generator=generator, device=device, dtype=torch.float64).cpu()
    cumulative = plan.cumsum(0)
    return (cumulative < u * cumulative[-1]).sum(0).clamp(max=len(plan) - 1)


def _check(x0: Tensor, x1: Tensor) -> None:
    if x0.shape != x1.shape:
        raise ValueError(f"source and data must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
