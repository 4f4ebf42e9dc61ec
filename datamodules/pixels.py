"""From raw grey levels to the float images and videos of the contract, on whole batches and on any device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.philox import Draws


@dataclass(frozen=True)
class Pixels:
    """Raw levels 0 .. levels-1 to float in [-1, 1].

    Scaling is `2 x / (levels - 1) - 1`; with dequantisation in training `2 (x + u) / levels - 1`, u ~ U(0, 1)
    (uniform dequantisation, arXiv 1511.01844 section 3.1).

    Args:
        levels: number of grey levels of the raw data (256 for 8-bit images).
        flip: mirror half of the training images, or whole videos, left to right.
        dequantise: add uniform noise of one level in training.
    """

    levels: int = 256
    flip: bool = False
    dequantise: bool = False

    @property
    def augments(self) -> bool:
        """Whether training changes more than the scale."""
        return self.flip or self.dequantise

    def scale(self, raw: Tensor) -> Tensor:
        """Raw levels `(B, ..., H, W)` as float32 in [-1, 1]."""
        return raw.float() * (2 / (self.levels - 1)) - 1

    def augment(self, raw: Tensor, draws: Draws, prefix: str = "") -> Tensor:
        """The training data of raw levels `(B, ..., H, W)`; `prefix` names a second, independent set of draws."""
        if self.dequantise:
            noise = draws.uniform(f"{prefix}dequantise", tuple(raw.shape[1:]))
            x = (raw.float() + noise) * (2 / self.levels) - 1
        else:
            x = self.scale(raw)
        if self.flip:
            mirrored = draws.uniform(f"{prefix}flip") < 0.5
            x = torch.where(mirrored.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)
        return x


@dataclass(frozen=True)
class TurnedPixels(Pixels):
    """Pixels that are also turned in training, by 0, 90, 180 or 270 degrees with equal chance.

    Args:
        rotate: turn; images must be square.
    """

    rotate: bool = False

    @property
    def augments(self) -> bool:
        return self.rotate or super().augments

    def augment(self, raw: Tensor, draws: Draws, prefix: str = "") -> Tensor:
        x = super().augment(raw, draws, prefix)
        if not self.rotate:
            return x
        quarters = (draws.uniform(f"{prefix}rotate") * 4).view(-1, *[1] * (x.ndim - 1))
        x = torch.where(quarters >= 2, x.flip((-2, -1)), x)
        return torch.where(quarters % 2 >= 1, x.rot90(1, (-2, -1)), x)
