"""Boxes as numbers relative to a prior box, and back."""

import math

import torch
from torch import Tensor

from penstock.lightning_modules.detection.boxes import centers, clipped, sides
from penstock.lightning_modules.errors import UserError

LARGEST = abs(math.log(16 / 1000))  # of the logarithm of a side's ratio


class Deltas:
    """Offset of the centre over the prior's side, logarithm of the sides' ratio; divided by `stds`.

    Args:
        stds: Of dx, dy, dw, dh.
        extent: Of the boxes.

    Raises:
        UserError: deviations that are not above 0.
    """

    def __init__(self, stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0), extent: float = 0.0):
        if not all(std > 0 for std in stds):
            raise UserError(f"coding.stds: found {list(stds)}, expected four numbers above 0")
        self.stds, self.extent = stds, extent

    def encode(self, priors: Tensor, boxes: Tensor) -> Tensor:
        """`(..., 4)` of boxes `(..., 4)` at priors `(..., 4)`."""
        prior, side = sides(priors, self.extent), sides(boxes, self.extent)
        found = torch.cat([(centers(boxes) - centers(priors)) / prior, (side / prior).log()], -1)
        return found / self._as(found)

    def decode(self, priors: Tensor, deltas: Tensor, size: tuple[float, float] | None = None) -> Tensor:
        """Boxes `(..., 4)`, cut at the border of an image of (height, width) where it is given."""
        deltas = deltas * self._as(deltas)
        prior = sides(priors, self.extent)
        center = centers(priors) + deltas[..., :2] * prior
        half = (prior * deltas[..., 2:].clamp(-LARGEST, LARGEST).exp() - self.extent) / 2
        found = torch.cat([center - half, center + half], -1)
        return found if size is None else clipped(found, size, self.extent)

    def _as(self, deltas: Tensor) -> Tensor:
        """The deviations in type and place of some deltas, which nobody waits for."""
        return torch.tensor(self.stds, dtype=deltas.dtype).to(deltas.device, non_blocking=True)


class Distances:
    """Distances from the prior's centre to the bottom, top, left and right of the box, over the prior's side (FSAF).

    Args:
        extent: Of the boxes; the centre then lies half a pixel further than the middle of the coordinates.
    """

    def __init__(self, extent: float = 0.0):
        self.extent = extent

    def centers(self, priors: Tensor) -> Tensor:
        return (priors[..., :2] + priors[..., 2:] + self.extent) / 2

    def encode(self, priors: Tensor, boxes: Tensor) -> Tensor:
        """`(..., 4)` of boxes `(..., 4)` at priors `(..., 4)`."""
        x, y = self.centers(priors).unbind(-1)
        width, height = sides(priors, self.extent).unbind(-1)
        x1, y1, x2, y2 = boxes.unbind(-1)
        found = [(y2 - y + self.extent) / height, (y - y1) / height, (x - x1) / width, (x2 - x + self.extent) / width]
        return torch.stack(found, -1)

    def decode(self, priors: Tensor, distances: Tensor, size: tuple[float, float] | None = None) -> Tensor:
        """Boxes `(..., 4)`, cut at the border of an image of (height, width) where it is given."""
        x, y = self.centers(priors).unbind(-1)
        width, height = sides(priors, self.extent).unbind(-1)
        bottom, top, left, right = distances.unbind(-1)
        found = [x - left * width, y - top * height, x + right * width - self.extent, y + bottom * height - self.extent]
        boxes = torch.stack(found, -1)
        return boxes if size is None else clipped(boxes, size, self.extent)
