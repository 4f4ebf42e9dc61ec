"""What all dense detectors have: boxes at the cells of maps, coded relative to priors."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.ranges import at_least
from penstock.lightning_modules.detection.selection import COCO, Found, Selection
from penstock.lightning_modules.errors import UserError

Maps = Sequence[Tensor]


class Outputs(NamedTuple):
    """Maps of every level: logits `(B, A * K, H_l, W_l)`, codes `(B, A * 4, H_l, W_l)`, and, of hosts that have it, the
    logit of how well a box fits `(B, A, H_l, W_l)`."""

    logits: Maps
    codes: Maps
    quality: Maps | None = None

    def wide(self) -> "Outputs":
        """The same in float32 at least: logarithms, exponentials and sums of half precision lose too much."""
        return Outputs(*(maps and [y.to(torch.promote_types(y.dtype, torch.float32)) for y in maps] for maps in self))


class Objects(NamedTuple):
    """Boxes `(n, 4)`, classes `(n,)` and, of data that have them, masks uint8 `(n, h, w)` of an image."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None


class Matched(NamedTuple):
    """Priors that are an object's, over all images, `(k,)` each: image, prior, object counted over all images, its box
    `(k, 4)` and class."""

    image: Tensor
    prior: Tensor
    number: Tensor
    boxes: Tensor
    labels: Tensor


def matched(owners: Tensor, objects: Sequence[Objects]) -> Matched:
    """The priors of objects.

    Args:
        owners: Number of the object of each prior in its image `(B, n)`, less than 0 for those of none.
        objects: Of every image.
    """
    image, prior = (owners >= 0).nonzero(as_tuple=True)
    first = torch.tensor([0, *(len(one.boxes) for one in objects)]).cumsum(0).to(owners.device, non_blocking=True)
    number = first[image] + owners[image, prior]
    boxes, labels = (torch.cat([getattr(one, name) for one in objects]) for name in ("boxes", "labels"))
    return Matched(image, prior, number, boxes[number], labels[number])


class Host(ABC):
    """A dense detector's losses and boxes, made of a head's maps.

    Args:
        num_classes: K.
        anchors: Priors, A a cell.
        coding: Of boxes at priors.
        selection: Of the boxes that are given.

    Attributes:
        positive: Whether codes are distances: a head that makes them ends in a ReLU, and starts at 1.
        quality: Whether a head also says how well boxes fit; scores of boxes are then `sqrt(p * quality)`.

    Raises:
        UserError: anchors and coding of two pixel conventions, or a number out of range, here as of all hosts.
    """

    quality = False

    def __init__(
        self, num_classes: int, anchors: Anchors, coding: Deltas | Distances, selection: Selection = COCO
    ) -> None:
        at_least(1, num_classes=num_classes)
        if coding.extent != anchors.extent:
            found = f"coding.extent={coding.extent:g} with anchors.legacy={str(anchors.legacy).lower()}"
            raise UserError(f"host: found {found}, expected extent=1 and legacy=true, or 0 and false")
        self.num_classes, self.anchors, self.coding, self.selection = num_classes, anchors, coding, selection
        self.positive = isinstance(coding, Distances)

    @abstractmethod
    def losses(
        self, outputs: Outputs, objects: Sequence[Objects], padded: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Scalars by name, to be summed up. Their means over the ranks are the losses of one rank with all images.

        Args:
            outputs: Of a head.
            objects: Of every image.
            padded: (height, width) of the images with their own padding: no prior lies in what a batch adds.
        """

    def priors(self, maps: Maps) -> list[Tensor]:
        """`(n_l, 4)` of every level."""
        return self.anchors.grid(sizes_of(maps), maps[0].device)

    def flat(self, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `(B, n, K)`, codes `(B, n, 4)` and priors `(n, 4)` of all levels."""
        rows = torch.cat(rows_of(outputs.logits, self.num_classes), 1), torch.cat(rows_of(outputs.codes, 4), 1)
        return *rows, torch.cat(self.priors(outputs.logits))

    def aims(self, scores: Tensor, priors: Tensor, found: Matched) -> tuple[Tensor, Tensor]:
        """What priors should give: classes `(B, n, K)` in {0, 1}, and codes `(B, n, 4)`, 0 for those of no object."""
        classes = torch.zeros_like(scores)
        classes[found.image, found.prior, found.labels] = 1
        codes = scores.new_zeros(*scores.shape[:2], 4)
        codes[found.image, found.prior] = self.coding.encode(priors[found.prior], found.boxes).to(codes.dtype)
        return classes, codes

    def detections(
        self, outputs: Outputs, sizes: Sequence[tuple[float, float]], scales: Tensor | None = None
    ) -> list[Found]:
        """Boxes of every image.

        Args:
            outputs: Of a head.
            sizes: (height, width) of the images without padding.
            scales: What boxes are divided by, `(B, 4)`.
        """
        scores = [y.sigmoid() for y in rows_of(outputs.logits, self.num_classes)]
        fits = None if outputs.quality is None else [y.sigmoid() for y in rows_of(outputs.quality, 1)]
        codes, priors = rows_of(outputs.codes, 4), self.priors(outputs.logits)
        return self.selection(scores, codes, priors, self.coding.decode, sizes, scales, self.anchors.extent, fits)


def rows_of(maps: Maps, width: int) -> list[Tensor]:
    """Maps `(B, A * width, H_l, W_l)`, anchor by anchor, as `(B, H_l * W_l * A, width)`."""
    return [y.permute(0, 2, 3, 1).reshape(len(y), -1, width) for y in maps]


def sizes_of(maps: Maps) -> list[tuple[int, int]]:
    """(H_l, W_l) of maps `(B, C, H_l, W_l)`."""
    return [tuple(y.shape[-2:]) for y in maps]
