"""FreeAnchor, arXiv 1909.02466: every object chooses among a bag of anchors by what they predict."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.lightning_modules.callbacks.ranks import shared_count
from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.boxes import iou
from penstock.lightning_modules.detection.coding import Deltas
from penstock.lightning_modules.detection.host import Host, Objects, Outputs
from penstock.lightning_modules.detection.ranges import at_least, fractions
from penstock.lightning_modules.detection.selection import COCO, Selection


def mean_max(p: Tensor) -> Tensor:
    """Eq. 7: mean of probabilities `(..., n)` weighted by `1 / (1 - p)`, between their mean and their largest."""
    weight = 1 / (1 - p).clamp(min=1e-12)
    return (weight * p).sum(-1) / weight.sum(-1)


class FreeAnchor(Host):
    """FreeAnchor's losses, over all anchors of all levels.

    Args:
        num_classes: K.
        anchors: Priors.
        coding: Of boxes at anchors.
        bag: Anchors of a bag: those that overlap an object most.
        overlap: Predicted boxes that overlap an object by less are background.
        alpha: Weight of the loss of bags; that of the background is the rest.
        gamma: Exponent of the background's focal loss.
        beta: Where smooth L1 turns linear.
        weight: Of smooth L1 in a box's likelihood.
        selection: Of boxes.
    """

    def __init__(
        self,
        num_classes: int,
        anchors: Anchors,
        coding: Deltas,
        bag: int = 50,
        overlap: float = 0.6,
        alpha: float = 0.5,
        gamma: float = 2.0,
        beta: float = 0.11,
        weight: float = 0.75,
        selection: Selection = COCO,
    ):
        super().__init__(num_classes, anchors, coding, selection)
        at_least(1, host__bag=bag)
        fractions(host__overlap=overlap, host__alpha=alpha)
        at_least(0, host__gamma=gamma, host__beta=beta, host__weight=weight)
        self.bag, self.overlap, self.alpha, self.gamma = bag, overlap, alpha, gamma
        self.beta, self.weight = beta, weight

    def losses(
        self, outputs: Outputs, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """`bag` and `background`, see `Host`; images' padding is not looked at."""
        scores, found, anchors = self.flat(outputs)
        p, bags, background = scores.sigmoid(), 0 * found.sum(), scores.new_zeros(())
        for own_p, own_codes, one in zip(p, found, objects):
            if len(one.boxes):
                bags = bags - self._bags(own_p, own_codes, anchors, one).log().clamp(min=-100).sum()
            q = own_p * (1 - self._of_objects(own_codes.detach(), anchors, one))
            background = (
                background + (q**self.gamma * F.binary_cross_entropy(q, torch.zeros_like(q), reduction="none")).sum()
            )
        count = shared_count(scores.new_full((), sum(len(one.boxes) for one in objects)))
        return {"bag": self.alpha * bags / count, "background": (1 - self.alpha) * background / (count * self.bag)}

    def _bags(self, p: Tensor, codes: Tensor, anchors: Tensor, objects: Objects) -> Tensor:
        """Likelihood `(m,)` of every object by its bag."""
        overlaps = iou(objects.boxes, anchors, self.anchors.extent)
        bag = overlaps.topk(min(self.bag, len(anchors)), 1).indices
        aims = self.coding.encode(anchors[bag], objects.boxes[:, None].expand(-1, bag.shape[1], -1))
        distance = F.smooth_l1_loss(codes[bag], aims.to(codes.dtype), reduction="none", beta=self.beta).sum(-1)
        return mean_max(p[bag, objects.labels[:, None]] * (-self.weight * distance).exp())

    @torch.no_grad()
    def _of_objects(self, codes: Tensor, anchors: Tensor, objects: Objects) -> Tensor:
        """How sure the predicted box of each anchor is one of an object of each class, `(n, K)`."""
        found = codes.new_zeros(self.num_classes, len(anchors))
        if len(objects.boxes):
            overlaps = iou(objects.boxes, self.coding.decode(anchors, codes), self.anchors.extent)
            span = overlaps.amax(1, keepdim=True) - self.overlap
            sure = torch.where(span > 1e-12, (overlaps - self.overlap) / span, 0).clamp(0, 1)
            found.scatter_reduce_(0, objects.labels[:, None].expand_as(sure), sure.to(found.dtype), "amax")
        return found.T
