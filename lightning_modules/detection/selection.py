"""Boxes out of the maps of a dense detector."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.lightning_modules.detection.boxes import suppressed
from penstock.lightning_modules.detection.ranges import at_least, fractions

Decode = Callable[[Tensor, Tensor, tuple[float, float]], Tensor]


class Found(NamedTuple):
    """Boxes `(n, 4)`, scores `(n,)` and classes `(n,)` of an image, best first.

    Detectors that segment add masks: probabilities `(n, M, M)` of the cells of each box.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


class Selection:
    """Which of the boxes of all cells are given.

    Args:
        per_level: Cells of each level, by their best score.
        score: Boxes of larger probabilities of a class.
        overlap: Largest intersection over union of boxes of a class.
        most: In an image.

    Raises:
        UserError: a number out of range.
    """

    def __init__(self, per_level: int = 1000, score: float = 0.05, overlap: float = 0.5, most: int = 100):
        at_least(1, selection__per_level=per_level, selection__most=most)
        fractions(selection__score=score, selection__overlap=overlap)
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
        fits: Sequence[Tensor] | None = None,
    ) -> list[Found]:
        """Boxes of every image.

        Args:
            scores: Of every level, probabilities of classes `(B, n_l, K)`.
            coded: `(B, n_l, 4)`.
            priors: `(n_l, 4)`.
            decode: Makes boxes of priors, coded ones and (height, width) of the image.
            sizes: (height, width) of the images without padding.
            scales: What boxes are divided by at the end, `(B, 4)`.
            extent: Of the boxes.
            fits: How well boxes fit `(B, n_l, 1)`, in [0, 1]: boxes then have and are ordered by `weighed` scores; the
                threshold is on the probability alone, as in the official code of FCOS and of ATSS.
        """
        kept = []
        for score, code, prior, value in zip(scores, coded, priors, weighed(scores, fits)):
            best = value.amax(2).topk(min(self.per_level, value.shape[1]), 1).indices
            each = best.unsqueeze(2)
            p, value = (x.gather(1, each.expand(-1, -1, x.shape[2])) for x in (score, value))
            kept.append((p, value, code.gather(1, each.expand(-1, -1, 4)), prior[best]))
        score, value, code, prior = (torch.cat(parts, 1) for parts in zip(*kept))
        found = []
        for image, size in enumerate(sizes):
            boxes = decode(prior[image], code[image], size)
            if scales is not None:
                boxes = boxes / scales[image]
            cell, label = (score[image] > self.score).nonzero(as_tuple=True)
            boxes, values = boxes[cell], value[image][cell, label]
            order = suppressed(boxes, values, label, self.overlap, self.most, extent)
            found.append(Found(boxes[order], values[order], label[order]))
        return found


def weighed(scores: Sequence[Tensor], fits: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """`sqrt(p * fit)` of every level, the geometric mean; p where there is no fit."""
    return scores if fits is None else [(p * fit).sqrt() for p, fit in zip(scores, fits)]


COCO = Selection()
