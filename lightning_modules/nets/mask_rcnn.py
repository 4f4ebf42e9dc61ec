"""Mask R-CNN, arXiv 1703.06870, on torchvision's parts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.detection.selection import Found
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.map_backbone import MapBackbone
from penstock.lightning_modules.nets.two_stage import TwoStageDetector

WINDOW = 14  # cells of a side of what is seen of a box; masks have twice as many


class MaskDetector(TwoStageDetector):
    """`TwoStageDetector` that also says which pixels of a box are the object's.

    Args:
        backbone: See `TwoStageDetector`, as of all others.
        num_classes: K.
        channels: Of the pyramid, and of the masks' head.
        layers: Of pyramid convolutions; 0 is the plain detector.
        more: Of `TwoStageDetector`.

    Raises:
        UserError: as `TwoStageDetector`; on a call, objects without masks.
    """

    def __init__(self, backbone: MapBackbone, num_classes: int, channels: int = 256, layers: int = 0, **more: Any):
        super().__init__(backbone, num_classes, channels, layers, **more)
        heads = self.net.roi_heads
        heads.mask_roi_pool = self._regions(heads.box_roi_pool.featmap_names, WINDOW)
        heads.mask_head = MaskRCNNHeads(channels, (channels,) * 4, 1)
        heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes + 1)

    def losses(self, image: Tensor, objects: Sequence[Objects], padded: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Losses of proposals, boxes and masks, scalars by name."""
        if any(one.masks is None for one in objects):
            raise UserError("data.masks: found false, expected true of a detector that segments")
        return super().losses(image, objects, padded)

    def _target(self, one: Objects) -> dict[str, Tensor]:
        return {**super()._target(one), "masks": one.masks}

    def _found(self, one: dict[str, Tensor], scale: Tensor) -> Found:
        return super()._found(one, scale)._replace(masks=one["masks"][:, 0])
