"""FCOS, arXiv 1904.01355, and ATSS, arXiv 1912.02424: boxes weighed by how near an object's middle they are made."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from penstock.lightning_modules.callbacks.ranks import shared_count
from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.assignment import IGNORED, NEGATIVE
from penstock.lightning_modules.detection.boxes import area, centers, iou
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.host import Host, Objects, Outputs, matched, rows_of, sizes_of
from penstock.lightning_modules.detection.ranges import above_zero, at_least, fractions
from penstock.lightning_modules.detection.selection import COCO, Selection


class Assign:
    """Rule by which priors are an object's."""

    def __call__(self, priors: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Number `(n,)` of the box of each prior of all levels, or `NEGATIVE`.

        Args:
            priors: `(n_l, 4)` of every level.
            boxes: `(m, 4)`, at least one.
        """
        raise NotImplementedError


def reach(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances `(..., 4)` of points `(..., 2)` to the left, top, right and bottom of boxes `(..., 4)`."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """FCOS eq. 3: 1 in the middle of a box, 0 at its border, `(...)`."""
    left, top, right, bottom = reach(points, boxes).unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    return (across * torch.minimum(top, bottom) / torch.maximum(top, bottom)).clamp(min=0).sqrt()


class ByDistance(Assign):
    """FCOS's rule: a cell near the middle of an object, on the level made for objects of its size, is the object's.

    Of several objects the smallest has the cell.

    Args:
        radius: Of the middle, strides.
        largest: Distance to a side that a level is made for at most, strides; the level before ends at half of it.

    Raises:
        UserError: one of them is not above 0.
    """

    def __init__(self, radius: float = 1.5, largest: float = 8.0):
        above_zero(assign__radius=radius, assign__largest=largest)
        self.radius, self.largest = radius, largest

    def __call__(self, priors: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Number `(n,)` of the box of each prior, squares as large as the stride, or `NEGATIVE`."""
        found = []
        for level, own in enumerate(priors):
            points, stride = centers(own)[:, None], (own[:, 2:] - own[:, :2])[:, :1]
            far = reach(points, boxes[None]).amax(2)
            fits = far <= (self.largest * stride if level < len(priors) - 1 else float("inf"))
            if level:
                fits &= far > self.largest * stride / 2
            near = ((points - centers(boxes)[None]).abs() < self.radius * stride[:, None]).all(2)
            inside = (reach(points, boxes[None]) > 0).all(2)
            size = torch.where(fits & near & inside, area(boxes)[None], float("inf"))
            least, owner = size.min(1)
            found.append(torch.where(least.isfinite(), owner, NEGATIVE))
        return torch.cat(found)


class ByStatistics(Assign):
    """ATSS's rule: an object's are those of the nearest anchors that overlap it by more than their mean and deviation.

    An anchor of several objects goes to the one that it overlaps most.

    Args:
        nearest: Anchors of each level that are looked at.

    Raises:
        UserError: none.
    """

    def __init__(self, nearest: int = 9):
        at_least(1, assign__nearest=nearest)
        self.nearest = nearest

    def __call__(self, priors: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Number `(n,)` of the box of each anchor, or `NEGATIVE`."""
        first, near = 0, []
        for own in priors:
            distance = torch.cdist(centers(boxes), centers(own))
            near.append(first + distance.topk(min(self.nearest, len(own)), 1, largest=False).indices)
            first += len(own)
        anchors, near = torch.cat(list(priors)), torch.cat(near, 1)
        overlaps = iou(boxes, anchors)
        of_near = overlaps.gather(1, near)
        enough = of_near >= of_near.mean(1, keepdim=True) + of_near.std(1, keepdim=True)
        inside = (reach(centers(anchors[near]), boxes[:, None]) > 0.01).all(2)
        chosen = torch.full_like(overlaps, -1).scatter(1, near, torch.where(enough & inside, of_near, -1))
        best, owner = chosen.max(0)
        return torch.where(best >= 0, owner, NEGATIVE)


class Centered(Host):
    """Focal loss, generalized IoU and centre-ness, in the modern pixel convention.

    Args:
        num_classes: K.
        anchors: Priors, one a cell.
        coding: Of boxes at priors.
        assign: Which prior is whose.
        box_weight: Of the loss of boxes.
        alpha: Weight of positives in the focal loss.
        gamma: Its exponent.
        selection: Of boxes.
    """

    quality = True

    def __init__(
        self,
        num_classes: int,
        anchors: Anchors,
        coding: Deltas | Distances,
        assign: Assign,
        box_weight: float = 1.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        selection: Selection = COCO,
    ):
        super().__init__(num_classes, anchors, coding, selection)
        fractions(host__alpha=alpha)
        at_least(0, host__gamma=gamma, host__box_weight=box_weight)
        self.assign, self.box_weight, self.alpha, self.gamma = assign, box_weight, alpha, gamma

    def losses(
        self, outputs: Outputs, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """`class`, `box` and `quality`, see `Host`."""
        scores, codes, priors = self.flat(outputs)
        quality = torch.cat(rows_of(outputs.quality, 1), 1).squeeze(2)
        owners = torch.stack([self.owners(outputs, one, shape) for one, shape in zip(objects, padded)])
        image, at, _, boxes, labels = matched(owners, objects)
        classes = torch.zeros_like(scores)
        classes[image, at, labels] = 1
        focal = sigmoid_focal_loss(scores, classes, self.alpha, self.gamma) * (owners >= NEGATIVE).unsqueeze(2)
        aims = centerness(centers(priors[at]), boxes)
        found = self.coding.decode(priors[at], codes[image, at])
        fits = generalized_box_iou_loss(found, boxes.to(found.dtype)) * aims
        count, weight = shared_count(aims.new_full((), len(at))), shared_count(aims.sum(), least=1e-6)
        fit = F.binary_cross_entropy_with_logits(quality[image, at], aims.to(quality.dtype), reduction="sum")
        return {
            "class": focal.sum() / count,
            "box": self.box_weight * fits.sum() / weight,
            "quality": fit / count,
        }

    def owners(self, outputs: Outputs, objects: Objects, padded: tuple[int, int]) -> Tensor:
        """Number `(n,)` of the object of each prior, or less than 0."""
        priors, sizes = self.priors(outputs.logits), sizes_of(outputs.logits)
        inside = self.anchors.inside(sizes, padded, priors[0].device)
        if not len(objects.boxes):
            return torch.where(inside, NEGATIVE, IGNORED)
        return self.assign(priors, objects.boxes).masked_fill(~inside, IGNORED)
