"""Boxes out of the maps of a dense detector."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.lightning_modules.detection.boxes import suppressed

Decode = Callable[[Tensor, Tensor, tuple[float, float]], Tensor]


class Found(NamedTuple):
    """Boxes `(n, 4)`, scores `(n,)` and classes `(n,)` of an image, best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Selection:
    """Which of the boxes of all cells are given.

    Args:
        per_level: Cells of each level, by their best score.
        score: Boxes of larger ones.
        overlap: Largest intersection over union of boxes of a class.
        most: In an image.
    """

    def __init__(self, per_level: int = 1000, score: float = 0.05, overlap: float = 0.5, most: int = 100):
        self.per_level, self.score, self.overlap, self.most = per_level, score, overlap, most

    @torch.no_grad()
    def __call__(
        self,
        scores: Sequence[Tensor],
        coded: Sequence[Tensor],
        priors: Sequence[Tensor],
        decode: Decode,
        sizes: Sequence[tuple[float, float]],
        scales: Tensor | None = None,
        extent: float = 0.0,
    ) -> list[Found]:
        """Boxes of every image.

        Args:
            scores: Of every level `(B, n_l, K)`, in [0, 1].
            coded: `(B, n_l, 4)`.
            priors: `(n_l, 4)`.
            decode: Makes boxes of priors, coded ones and (height, width) of the image.
            sizes: (height, width) of the images without padding.
            scales: What boxes are divided by at the end, `(B, 4)`.
            extent: Of the boxes.
        """
        kept = []
        for score, code, prior in zip(scores, coded, priors):
            best = score.amax(2).topk(min(self.per_level, score.shape[1]), 1).indices
            each = best.unsqueeze(2)
            kept.append(
                (
                    score.gather(1, each.expand(-1, -1, score.shape[2])),
                    code.gather(1, each.expand(-1, -1, 4)),
                    prior[best],
                )
            )
        score, code, prior = (torch.cat(parts, 1) for parts in zip(*kept))
        found = []
        for image, size in enumerate(sizes):
            boxes = decode(prior[image], code[image], size)
            if scales is not None:
                boxes = boxes / scales[image]
            cell, label = (score[image] > self.score).nonzero(as_tuple=True)
            boxes, values = boxes[cell], score[image][cell, label]
            order = suppressed(boxes, values, label, self.overlap, self.most, extent)
            found.append(Found(boxes[order], values[order], label[order]))
        return found


COCO = Selection()
