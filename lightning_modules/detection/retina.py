"""RetinaNet, arXiv 1708.02002: focal loss of all anchors, smooth L1 of those that overlap an object."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from penstock.lightning_modules.callbacks.ranks import shared_count
from penstock.lightning_modules.detection.anchors import Anchors, Sizes
from penstock.lightning_modules.detection.assignment import NEGATIVE, RETINA, Thresholds, by_overlap
from penstock.lightning_modules.detection.coding import Deltas
from penstock.lightning_modules.detection.host import Host, Objects, Outputs, matched, sizes_of
from penstock.lightning_modules.detection.ranges import at_least, fractions
from penstock.lightning_modules.detection.selection import COCO, Selection
from penstock.lightning_modules.errors import UserError


class Retina(Host):
    """RetinaNet's losses.

    Args:
        num_classes: K.
        anchors: Priors.
        coding: Of boxes at anchors.
        limits: Of the overlap of anchors that are assigned.
        alpha: Weight of positives in the focal loss.
        gamma: Its exponent.
        beta: Where smooth L1 turns linear.
        selection: Of boxes.
    """

    def __init__(
        self,
        num_classes: int,
        anchors: Anchors,
        coding: Deltas,
        limits: Thresholds = RETINA,
        alpha: float = 0.25,
        gamma: float = 2.0,
        beta: float = 0.11,
        selection: Selection = COCO,
    ):
        super().__init__(num_classes, anchors, coding, selection)
        fractions(limits__positive=limits.positive, limits__negative=limits.negative, host__alpha=alpha)
        at_least(0, host__gamma=gamma, host__beta=beta)
        if limits.positive < limits.negative:
            raise UserError(
                f"limits.positive: found {limits.positive:g}, expected at least limits.negative={limits.negative:g}"
            )
        self.limits, self.alpha, self.gamma, self.beta = limits, alpha, gamma, beta

    def losses(
        self, outputs: Outputs, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """`class` and `box`, see `Host`."""
        focal, boxes = self.terms(outputs, objects, padded)
        return {"class": focal.sum(), "box": boxes.sum()}

    def terms(
        self, outputs: Outputs, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Losses of each anchor `(B, n)`: of its class and of its box, over the number of all ranks' positives."""
        scores, found, anchors = self.flat(outputs)
        owners = torch.stack(
            [self.owners(anchors, one, sizes_of(outputs.logits), shape) for one, shape in zip(objects, padded)]
        )
        positive = owners >= 0
        classes, aims = self.aims(scores, anchors, matched(owners, objects))
        count = shared_count(positive.sum(1).clamp(min=1).sum())
        focal = sigmoid_focal_loss(scores, classes, self.alpha, self.gamma).sum(2) * (owners >= NEGATIVE)
        boxes = F.smooth_l1_loss(found, aims, reduction="none", beta=self.beta).sum(2) * positive
        return focal / count, boxes / count

    def owners(self, anchors: Tensor, objects: Objects, sizes: Sizes, padded: tuple[int, int]) -> Tensor:
        """Number `(n,)` of the object of each anchor, or less than 0."""
        inside = self.anchors.inside(sizes, padded, anchors.device)
        return by_overlap(anchors, objects.boxes, inside, self.limits, self.anchors.extent)
