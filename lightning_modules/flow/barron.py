"""Squared errors that are reweighted by their own size (arXiv 1701.03077), as TwinFlow trains with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.lightning_modules.flow.losses import FlowLoss, Regression, squared_error


@dataclass(frozen=True)
class Barron(FlowLoss):
    """`m w(m) / c` with `m` the mean squared error of a sample and `w = (q / |alpha - 2| + 1)^((alpha - 2) / 2)`.

    `q = m / (c^2 + 1e-8)`; the weight sends no gradient, so that with `alpha = 1` and `m >> c^2` every sample's
    gradient has the same size, `2 (u - target) / (D sqrt(m))` (arXiv 2512.05150, official code).

    Args:
        alpha: 2 is the squared error over c, 1 the root of it where it is large.
        c: Error at which the weight sets in, positive.

    Raises:
        ValueError: c that is not positive.
    """

    alpha: float = 1.0
    c: float = 1e-3

    def __post_init__(self):
        if self.c <= 0:
            raise ValueError(f"Barron: c {self.c}, expected a positive number")

    def __call__(self, r: Regression) -> Tensor:
        working = torch.promote_types(r.prediction.dtype, torch.float32)
        m = squared_error(r.prediction.to(working), r.target.to(working))
        bend = abs(self.alpha - 2)
        if bend < 1e-5:
            return m / self.c
        q = m.detach() / (self.c**2 + 1e-8)
        return m * (q / bend + 1) ** ((self.alpha - 2) / 2) / self.c
