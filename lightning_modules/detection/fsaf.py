"""FSAF, arXiv 1903.00621: one square a cell, and every object trains the level that predicts it best."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from penstock.lightning_modules.callbacks.ranks import shared_count
from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.assignment import IGNORED, NEGATIVE
from penstock.lightning_modules.detection.boxes import area, intersection, sides
from penstock.lightning_modules.detection.coding import Distances
from penstock.lightning_modules.detection.host import Host, Objects, Outputs, matched, sizes_of
from penstock.lightning_modules.detection.ranges import above_zero, at_least, fractions
from penstock.lightning_modules.detection.selection import COCO, Selection

NEVER = 1e6  # loss of an object on a level without cells of it


def by_region(
    priors: Tensor,
    boxes: Tensor,
    allowed: Tensor,
    coding: Distances,
    factor: float = 0.2,
    least: float = 0.01,
    official: bool = False,
) -> Tensor:
    """Number `(n,)` of the box of each prior, `NEGATIVE` or `IGNORED`.

    A prior is a box's whose middle part it overlaps, if its centre lies in the box, else it is ignored. Of several
    boxes the smallest has it.

    Args:
        priors: `(n, 4)`.
        boxes: `(m, 4)`.
        allowed: bool `(n,)`; others are `IGNORED`.
        coding: Knows the priors' centres.
        factor: Side of the middle part over the box's.
        least: Overlap over the prior's area, at least.
        official: Order boxes by area as the released code does, which takes the inverse of the order and so does not
            always give a prior to the smallest.
    """
    found = torch.full((len(priors),), NEGATIVE, device=priors.device)
    if len(boxes):
        middle, half = coding.centers(boxes), sides(boxes, coding.extent) * factor / 2
        core = torch.cat([middle - half, middle + half - coding.extent], 1)
        near = intersection(priors, core, coding.extent) > least * area(priors, coding.extent)[:, None]
        center = coding.centers(priors)[:, None]
        inside = ((center > boxes[None, :, :2]) & (center < boxes[None, :, 2:])).all(2)
        priority = area(boxes, coding.extent).argsort(descending=True)
        priority = priority if official else priority.argsort()
        rank = torch.where(near & inside, priority, -1)
        found[(near & ~inside).any(1)] = IGNORED
        found = torch.where(rank.amax(1) >= 0, rank.argmax(1), found)
    return found.masked_fill(~allowed, IGNORED)


class Terms(NamedTuple):
    """Losses of each prior, of its classes `(B, n, K)` and of its box `(B, n)`, owners `(B, n)`, and what is kept.

    `table` has the losses `(L, m)` of the objects of all images by level.
    """

    classes: Tensor
    boxes: Tensor
    owners: Tensor
    kept: Tensor
    table: Tensor


class Fsaf(Host):
    """FSAF's losses.

    Args:
        num_classes: K.
        anchors: Priors, one square of a stride's side a cell.
        coding: Distances to the sides.
        factor: Side of the part of an object that trains over the object's.
        alpha: Weight of positives in the focal loss.
        gamma: Its exponent.
        official: Order objects by area as the released code does, see `by_region`.
        selection: Of boxes.
    """

    def __init__(
        self,
        num_classes: int,
        anchors: Anchors,
        coding: Distances,
        factor: float = 0.2,
        alpha: float = 0.25,
        gamma: float = 2.0,
        official: bool = False,
        selection: Selection = COCO,
    ):
        super().__init__(num_classes, anchors, coding, selection)
        above_zero(host__factor=factor)
        fractions(host__factor=factor, host__alpha=alpha)
        at_least(0, host__gamma=gamma)
        self.factor, self.alpha, self.gamma, self.official = factor, alpha, gamma, official

    def losses(
        self, outputs: Outputs, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """`class` and `box`, see `Host`."""
        terms = self.terms(outputs, objects, padded)
        count = shared_count(terms.kept.sum())
        return {"class": terms.classes.sum() / count, "box": terms.boxes.sum() / count}

    def terms(self, outputs: Outputs, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]) -> Terms:
        """Losses of all priors after every object has chosen its level, not divided by their number yet."""
        scores, found, priors = self.flat(outputs)
        sizes = sizes_of(outputs.logits)
        levels = torch.cat(
            [torch.full((len(p),), k, device=p.device) for k, p in enumerate(self.priors(outputs.logits))]
        )
        owners = torch.stack(
            [
                by_region(
                    priors,
                    one.boxes,
                    self.anchors.inside(sizes, shape, priors.device),
                    self.coding,
                    self.factor,
                    official=self.official,
                )
                for one, shape in zip(objects, padded)
            ]
        )
        positive, own = owners >= 0, matched(owners, objects)
        classes, aims = self.aims(scores, priors, own)
        focal = sigmoid_focal_loss(scores, classes, self.alpha, self.gamma) * (owners >= NEGATIVE).unsqueeze(2)
        boxes = torch.where(positive, iou_loss(found, aims), 0)
        level = levels[own.prior]
        loss = (focal[own.image, own.prior].sum(1) + boxes[own.image, own.prior]).detach()
        total = loss.new_zeros(len(outputs.logits), sum(len(one.boxes) for one in objects))
        number = torch.zeros_like(total)
        total.index_put_((level, own.number), loss, accumulate=True)
        number.index_put_((level, own.number), torch.ones_like(loss), accumulate=True)
        table = torch.where(number > 0, total / number.clamp(min=1), NEVER)
        kept = positive.clone()
        if len(own.prior):
            kept[own.image, own.prior] = table.argmin(0)[own.number] == level
        dropped = positive & ~kept
        return Terms(focal.masked_fill(dropped.unsqueeze(2) & (classes > 0), 0), boxes * kept, owners, kept, table)


def iou_loss(found: Tensor, aims: Tensor) -> Tensor:
    """`-log IoU` `(...,)` of distances `(..., 4)` in strides; a union of less than a stride squared counts as one."""
    low = torch.minimum(found, aims)
    both = (low[..., 0] + low[..., 1]) * (low[..., 2] + low[..., 3])
    areas = [(x[..., 0] + x[..., 1]) * (x[..., 2] + x[..., 3]) for x in (found, aims)]
    union = (areas[0] + areas[1] - both).clamp(min=1)
    return -(both / union).clamp(min=1e-6).log()
