"""Masks of boxes as masks of images."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from penstock.lightning_modules.instance_masks import Rle, encoded

THRESHOLD = 0.5
AT_ONCE = 16  # masks of the size of the image that lie in memory


def pasted(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> list[Rle]:
    """Run lengths of masks of an image.

    Args:
        masks: Probabilities `(n, M, M)` of the cells of each box.
        boxes: `(n, 4)`, in pixels of the image.
        size: Its height and width.
    """
    height, width = map(int, size)
    found: list[Rle] = []
    for some, where in zip(masks.split(AT_ONCE), boxes.split(AT_ONCE)):
        if len(some):
            found += encoded(paste_masks_in_image(some[:, None], where, (height, width))[:, 0] > THRESHOLD)
    return found
