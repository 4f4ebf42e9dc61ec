"""torchvision's RetinaNet as it is, on our backbones: a detector to compare with."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.detection.ranges import at_least
from penstock.lightning_modules.detection.selection import Found
from penstock.lightning_modules.nets.detector import BoxNetwork, check_strides
from penstock.lightning_modules.nets.map_backbone import MapBackbone


class Levels(nn.Module):
    """Maps `(B, channels, H_l, W_l)` by name, P3 to P7, the last two of P5, as torchvision makes them."""

    def __init__(self, backbone: MapBackbone, channels: int):
        super().__init__()
        self.backbone, self.out_channels = backbone, channels
        self.fpn = FeaturePyramidNetwork(backbone.channels, channels, LastLevelP6P7(channels, channels))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(level): x for level, x in enumerate(self.backbone(image))})


class AsGiven(GeneralizedRCNNTransform):
    """Pads images to a batch, and leaves their size: the data have resized them."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class TorchvisionRetinaNet(BoxNetwork):
    """Images `(B, 3, H, W)` in [-1, 1] to boxes, all but the backbone torchvision's.

    Args:
        backbone: With maps of strides 8, 16 and 32.
        num_classes: K.
        anchors: Theirs are rounded to whole pixels.
        channels: Of the pyramid.

    Raises:
        UserError: anchors of other strides, or a number out of range.
    """

    def __init__(self, backbone: MapBackbone, num_classes: int, anchors: Anchors, channels: int = 256):
        super().__init__()
        at_least(1, net__channels=channels, num_classes=num_classes)
        check_strides("anchors.strides", anchors.strides, backbone)
        self.num_classes = num_classes
        sides = tuple(tuple(int(stride * scale) for scale in anchors.scales) for stride in anchors.strides)
        self.net = RetinaNet(
            Levels(backbone, channels),
            num_classes,
            anchor_generator=AnchorGenerator(sides, (anchors.ratios,) * len(sides)),
            detections_per_img=100,
        )
        self.net.transform = AsGiven(1, 1, [0.0] * 3, [1.0] * 3)  # the backbone normalises

    @property
    def backbone(self) -> MapBackbone:
        return self.net.backbone.backbone

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles backbone and pyramid, and the head."""
        self.net.backbone.compile(*args, **kwargs)
        self.net.head.compile(*args, **kwargs)

    def losses(self, image: Tensor, objects: Sequence[Objects], padded: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Losses of classes and of boxes, scalars by name."""
        targets = [{"boxes": one.boxes, "labels": one.labels} for one in objects]
        found = self.net([one[:, :h, :w] for one, (h, w) in zip(image, padded)], targets)
        return {"class": found["classification"], "box": found["bbox_regression"]}

    def detections(self, image: Tensor, sizes: Sequence[Sequence[int]], scales: Tensor) -> list[Found]:
        """Boxes of every image, see `BoxNetwork`."""
        found = self.net([one[:, :h, :w] for one, (h, w) in zip(image, sizes)])
        return [Found(one["boxes"] / scale, one["scores"], one["labels"]) for one, scale in zip(found, scales)]
