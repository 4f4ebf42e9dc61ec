"""What all dense detectors have: boxes at the cells of maps, coded relative to priors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.selection import COCO, Found, Selection

Maps = Sequence[Tensor]


class Objects(NamedTuple):
    """Boxes `(n, 4)` and classes `(n,)` of an image."""

    boxes: Tensor
    labels: Tensor


class Host:
    """A dense detector's losses and boxes, of maps: logits `(B, A * K, H_l, W_l)` and codes `(B, A * 4, H_l, W_l)`.

    Args:
        num_classes: K.
        anchors: Priors, A a cell.
        coding: Of boxes at priors.
        selection: Of the boxes that are given.

    Attributes:
        positive: Whether codes are distances: a head that makes them ends in a ReLU, and starts at 1.
    """

    positive = False

    def __init__(
        self, num_classes: int, anchors: Anchors, coding: Deltas | Distances, selection: Selection = COCO
    ) -> None:
        self.num_classes, self.anchors, self.coding, self.selection = num_classes, anchors, coding, selection

    def losses(
        self, logits: Maps, codes: Maps, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Scalars by name, to be summed up.

        Args:
            logits: Of every level.
            codes: Likewise.
            objects: Of every image.
            padded: (height, width) of the images with their own padding: no prior lies in what a batch adds.
        """
        raise NotImplementedError

    def priors(self, maps: Maps) -> list[Tensor]:
        """`(n_l, 4)` of every level."""
        return self.anchors.grid(sizes_of(maps), maps[0].device)

    def flat(self, logits: Maps, codes: Maps) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `(B, n, K)`, codes `(B, n, 4)` and priors `(n, 4)` of all levels."""
        rows = torch.cat(rows_of(logits, self.num_classes), 1), torch.cat(rows_of(codes, 4), 1)
        return *rows, torch.cat(self.priors(logits))

    def detections(
        self, logits: Maps, codes: Maps, sizes: Sequence[tuple[float, float]], scales: Tensor | None = None
    ) -> list[Found]:
        """Boxes of every image.

        Args:
            logits: Of every level.
            codes: Likewise.
            sizes: (height, width) of the images without padding.
            scales: What boxes are divided by, `(B, 4)`.
        """
        scores = [y.sigmoid() for y in rows_of(logits, self.num_classes)]
        return self.selection(
            scores, rows_of(codes, 4), self.priors(logits), self.coding.decode, sizes, scales, self.anchors.extent
        )


def rows_of(maps: Maps, width: int) -> list[Tensor]:
    """Maps `(B, A * width, H_l, W_l)`, anchor by anchor, as `(B, H_l * W_l * A, width)`."""
    return [y.permute(0, 2, 3, 1).reshape(len(y), -1, width) for y in maps]


def sizes_of(maps: Maps) -> list[tuple[int, int]]:
    """(H_l, W_l) of maps `(B, C, H_l, W_l)`."""
    return [tuple(y.shape[-2:]) for y in maps]
