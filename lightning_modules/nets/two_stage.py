"""Faster R-CNN, arXiv 1506.01497, on torchvision's parts, with pyramid convolutions between pyramid and heads."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.detection.proposals import SharedSampler, shares_of_ranks
from penstock.lightning_modules.detection.ranges import at_least
from penstock.lightning_modules.detection.selection import Found
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.aligned_regions import AlignedRegions, ExactAnchors
from penstock.lightning_modules.nets.detector import BoxNetwork
from penstock.lightning_modules.nets.feature_pyramid import FeaturePyramid
from penstock.lightning_modules.nets.map_backbone import MapBackbone
from penstock.lightning_modules.nets.pyramid_conv import PyramidConv

LEVELS = 4
RATIOS = (0.5, 1.0, 2.0)
WINDOW = 7  # cells of a side of what is seen of a proposal


class Levels(nn.Module):
    """Maps `(B, channels, H_l, W_l)` by name, of images `(B, 3, H, W)`: P2 to P5, and P6, which only proposals see.

    Both proposals and boxes are made of what the pyramid convolutions give (arXiv 2005.03101, two-stage detectors).

    Args:
        backbone: With maps of strides 4 to 32.
        channels: Of every level.
        layers: Of pyramid convolutions; 0 is the plain detector.
        ibn: With integrated batch norm.
        deformable: Scale-equalizing.
    """

    def __init__(self, backbone: MapBackbone, channels: int, layers: int, ibn: bool, deformable: bool):
        super().__init__()
        self.backbone, self.out_channels = backbone, channels
        self.pyramid = FeaturePyramid(backbone.channels, channels, coarse=0, pooled=True)
        self.Pconvs = nn.ModuleList(PyramidConv(channels, deformable, ibn) for _ in range(layers))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(self.backbone(image))
        for layer in self.Pconvs:
            maps = layer(maps)
        return {str(level): y for level, y in enumerate(maps)}


class TwoStageDetector(BoxNetwork):
    """Images `(B, 3, H, W)` in [-1, 1] to boxes, by proposals.

    Args:
        backbone: With four maps, of strides 4, 8, 16 and 32 on photographs.
        num_classes: K.
        channels: Of the pyramid.
        layers: Of pyramid convolutions; 0 is the plain detector.
        ibn: With integrated batch norm.
        deformable: Scale-equalizing.
        anchor: Side of an anchor over the stride of its level.
        hidden: Width of the boxes' head.
        samples: Proposals of an image that the boxes' head is trained on; that of proposals has half as many.
        proposals: Best ones of an image in training and in evaluation, which the head makes boxes of.
        aligned: Regions and anchors as mmdetection has them, see `AlignedRegions`, in place of torchvision's.

    Raises:
        UserError: maps of other strides, or a number out of range.
    """

    def __init__(
        self,
        backbone: MapBackbone,
        num_classes: int,
        channels: int = 256,
        layers: int = 4,
        ibn: bool = False,
        deformable: bool = False,
        anchor: int = 8,
        hidden: int = 1024,
        samples: int = 512,
        proposals: tuple[int, int] = (2000, 1000),
        aligned: bool = False,
    ):
        super().__init__()
        self.num_classes = num_classes
        at_least(1, net__num_classes=num_classes, net__channels=channels, net__anchor=anchor, net__hidden=hidden)
        at_least(2, net__samples=samples)
        at_least(0, net__layers=layers)
        for kept in proposals:
            at_least(1, net__proposals=kept)
        finest = backbone.strides[0]
        if list(backbone.strides) != [finest * 2**level for level in range(LEVELS)]:
            raise UserError(
                f"backbone.layers: found strides {list(backbone.strides)} of {backbone.about}, expected four maps, the "
                "cells of each twice as large as before, such as [4, 8, 16, 32]"
            )
        levels = Levels(backbone, channels, layers, ibn, deformable)
        strides = [finest * 2**level for level in range(levels.pyramid.levels)]
        self.region_strides = strides[:-1] if aligned else None
        anchors = ExactAnchors if aligned else AnchorGenerator
        self.net = FasterRCNN(
            levels,
            rpn_anchor_generator=anchors(tuple((anchor * s,) for s in strides), (RATIOS,) * len(strides)),
            box_roi_pool=self._regions([str(level) for level in range(len(strides) - 1)], WINDOW),
            box_head=TwoMLPHead(channels * WINDOW**2, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1),
            rpn_batch_size_per_image=samples // 2,
            rpn_post_nms_top_n_train=proposals[0],
            rpn_post_nms_top_n_test=proposals[1],
            box_batch_size_per_image=samples,
        )
        for part in (self.net.rpn, self.net.roi_heads):
            own = part.fg_bg_sampler
            part.fg_bg_sampler = SharedSampler(own.batch_size_per_image, own.positive_fraction)

    def _regions(self, names: list[str], size: int) -> nn.Module:
        """What is seen of proposals, so many cells of a side."""
        if self.region_strides is None:
            return MultiScaleRoIAlign(names, size, 2)
        return AlignedRegions(names, size, self.region_strides)

    @property
    def backbone(self) -> MapBackbone:
        return self.net.backbone.backbone

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles backbone and pyramid: proposals and boxes have sizes that change with every image."""
        self.net.backbone.compile(*args, **kwargs)

    def losses(self, image: Tensor, objects: Sequence[Objects], padded: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Losses of proposals and of boxes, scalars by name. Their means over the ranks are those of one rank."""
        _, losses = self._run(image, padded, [self._target(one) for one in objects])
        of_proposals, of_boxes = shares_of_ranks([self.net.rpn.fg_bg_sampler, self.net.roi_heads.fg_bg_sampler])
        shares = {"objectness": of_proposals[0], "rpn_box_reg": of_proposals[0], "mask": of_boxes[1]}
        named = {name.removeprefix("loss_"): value for name, value in losses.items()}
        return {name: value * shares.get(name, of_boxes[0]) for name, value in named.items()}

    def detections(self, image: Tensor, sizes: Sequence[Sequence[int]], scales: Tensor) -> list[Found]:
        """Boxes of every image, see `BoxNetwork`."""
        found, _ = self._run(image, sizes, None)
        return [self._found(one, scale) for one, scale in zip(found, scales)]

    def _target(self, one: Objects) -> dict[str, Tensor]:
        """Objects as torchvision takes them."""
        return {"boxes": one.boxes, "labels": one.labels + 1}

    def _found(self, one: dict[str, Tensor], scale: Tensor) -> Found:
        """Boxes that torchvision gives."""
        return Found(one["boxes"] / scale, one["scores"], one["labels"] - 1)

    def _run(self, image: Tensor, sizes: Sequence[Sequence[int]], targets: list[dict[str, Tensor]] | None) -> tuple:
        images = ImageList(image, [tuple(size) for size in sizes])
        maps = self.net.backbone(image)
        proposals, losses = self.net.rpn(images, maps, targets)
        found, own = self.net.roi_heads(maps, proposals, images.image_sizes, targets)
        return found, {**losses, **own}
