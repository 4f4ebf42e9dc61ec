"""Losses of 2-rectified flow++ (arXiv 2405.20320 section 4.2) and of perceptual distillation (t = 0 noise, t = 1 data).

The paper's time is `t_paper = 1 - t` and its velocity the negative of ours. Where the pairs are a deterministic
coupling, as those of a trained flow are, any `m(a, b)` that is 0 only for `a = b` has the same minimiser. All assume
the straight line, on which the predicted data is `x_t + (1 - t) v`. `d` is the number of dimensions of a sample.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.lightning_modules.flow.losses import FlowLoss, Regression, squared_error
from penstock.lightning_modules.flow.paths import expand

Scaling = Literal["d", "sqrt_d"]
MARGIN = 1e-5


class Distance(ABC):
    """A distance of images, differentiable in the first."""

    def prepare(self) -> None:
        """Loads what is needed, once. Raises `UserError` where a file is missing or wrong."""
        return None

    @abstractmethod
    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of each pair `(B,)`, of RGB images `(B, 3, H, W)` that are meant for [0, 1] but never clipped."""


def for_distance(images: Tensor, size: int | None) -> Tensor:
    """Images `(B, 1 or 3, H, W)` in [-1, 1] as RGB in [0, 1], resized bilinearly to `size` pixels a side.

    None keeps the size, except that images below 32 pixels are brought to 32.

    Raises:
        ValueError: not images of 1 or 3 channels.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"a perceptual loss needs images (B, 1 or 3, H, W), got {tuple(images.shape)}")
    sides = (size, size) if size else tuple(max(32, side) for side in images.shape[2:])
    if sides != tuple(images.shape[2:]):
        images = F.interpolate(images, sides, mode="bilinear", align_corners=False)
    return (images * 0.5 + 0.5).expand(-1, 3, -1, -1)


def predicted_data(r: Regression) -> Tensor:
    """`x_t + (1 - t) v`."""
    return r.x_t + expand(1 - r.t, r.x_t) * r.prediction


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """`(sqrt(|e|^2 + c^2) - c) / d` per sample `(B,)`, without cancellation for small errors."""
    squares = error.square().flatten(1).sum(1)
    return squares / ((squares + c**2).sqrt() + c) / error[0].numel()


@dataclass(frozen=True)
class RootMeanSquare(FlowLoss):
    """`sqrt(|v - u|^2 / d)`; the square of it is `SquaredError`."""

    def __call__(self, r: Regression) -> Tensor:
        norm = torch.linalg.vector_norm((r.prediction - r.target).flatten(1), dim=1)
        return norm / math.sqrt(r.target[0].numel())


@dataclass(frozen=True)
class PseudoHuber(FlowLoss):
    """`H = (sqrt(|v - u|^2 + C^2) - C) / d` with `C = c d` (the paper's config D).

    Args:
        c: in units of the data, positive.
        scaling: `d` is what the paper's tables were made with; `sqrt_d`, `C = c sqrt(d)`, is the constant of improved
            consistency training (arXiv 2310.14189), which the authors meant. On CIFAR-10 C is 1.66 or 0.030.
    """

    c: float = 0.00054
    scaling: Scaling = "d"

    def __post_init__(self):
        if self.c <= 0:
            raise ValueError(f"{type(self).__name__}.c must be positive, got {self.c}")

    def __call__(self, r: Regression) -> Tensor:
        d = r.target[0].numel()
        return pseudo_huber(r.prediction - r.target, self.c * (d if self.scaling == "d" else math.sqrt(d)))


@dataclass(frozen=True)
class Perceptual(FlowLoss):
    """`P(x_t + (1 - t) v, x1)`, or with `divide_by_time` `P / (1 - t)`, which stays finite: P falls with (1 - t)^2.

    Args:
        distance: `P`.
        divide_by_time: by the paper's time `1 - t`, at least 1e-5.
        size: pixels a side at which images are compared; None keeps their size (at least 32).
    """

    distance: Distance
    divide_by_time: bool = False
    size: int | None = 224

    def prepare(self) -> None:
        self.distance.prepare()

    def __call__(self, r: Regression) -> Tensor:
        p = self.distance(for_distance(predicted_data(r), self.size), for_distance(r.x1, self.size))
        return p / (1 - r.t).clamp(min=MARGIN).to(p.dtype) if self.divide_by_time else p


@dataclass(frozen=True)
class PerceptualHuber(FlowLoss):
    """`t H + P / (1 - t)`: LPIPS-Huber-1/t (the paper's config F), or `t H + P`, LPIPS-Huber (config E).

    In the paper's time `(1 - t) H + P / t`; the factor of the Huber part never acts on P.

    Args:
        distance: `P`, LPIPS of `VGG16` with average pooling in the paper.
        divide_by_time: config F; 1 - t is at least 1e-5.
        size: pixels a side at which images are compared; None keeps their size (at least 32).
        c: see `PseudoHuber`.
        scaling: see `PseudoHuber`.
    """

    distance: Distance
    divide_by_time: bool = True
    size: int | None = 224
    c: float = 0.00054
    scaling: Scaling = "d"

    def __post_init__(self):
        PseudoHuber(self.c, self.scaling)

    def prepare(self) -> None:
        self.distance.prepare()

    def __call__(self, r: Regression) -> Tensor:
        h = PseudoHuber(self.c, self.scaling)(r)
        return r.t.to(h.dtype) * h + Perceptual(self.distance, self.divide_by_time, self.size)(r)


@dataclass(frozen=True)
class PerceptualDistillation(FlowLoss):
    """`P(x0 + v, x1)`, with `add_squared_error` plus `|v - u|^2 / d`: one-step distillation (arXiv 2209.03003).

    The step starts at the noise `x0` itself and has length 1, whatever t is: use it with `times.Fixed(1e-3)` only.

    Args:
        distance: `P`, LPIPS of `VGG16` in the paper.
        add_squared_error: `lpips + l2` with equal weights instead of `lpips`.
        size: pixels a side at which images are compared; None keeps their size (at least 32).
    """

    distance: Distance
    add_squared_error: bool = False
    size: int | None = None

    def prepare(self) -> None:
        self.distance.prepare()

    def __call__(self, r: Regression) -> Tensor:
        p = self.distance(for_distance(r.x0 + r.prediction, self.size), for_distance(r.x1, self.size))
        return p + squared_error(r.prediction, r.target) if self.add_squared_error else p
