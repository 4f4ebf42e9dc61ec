"""Regions and anchors of two-stage detectors at their exact places, as in mmdetection and detectron2."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

CPU = torch.device("cpu")


class ExactAnchors(AnchorGenerator):
    """torchvision's anchors, whose sides it would round to whole pixels."""

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> Tensor:
        """`(scales * ratios, 4)` around 0, xyxy; a ratio is height over width."""
        scale = torch.tensor(scales, dtype=dtype, device=device)
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        width, height = (scale / root).flatten(), (scale * root).flatten()
        return torch.stack([-width, -height, width, height], 1) / 2


class AlignedRegions(MultiScaleRoIAlign):
    """Cells of boxes in the level of their size, arXiv 1703.06870 section 3 and 1612.03144 eq. 1.

    A pixel's value is that of its middle, where torchvision's detectors take its corner, half a cell off; a cell is the
    mean of as many samples as it has pixels, where these take four.

    Args:
        featmap_names: Of the levels, the finest first.
        size: Cells of a side.
        strides: Of the levels.
    """

    def __init__(self, featmap_names: Sequence[str], size: int, strides: Sequence[int]):
        super().__init__(list(featmap_names), size, -1)
        self.strides = list(strides)
        finest = round(math.log2(self.strides[0]))
        self.level = LevelMapper(finest, finest + len(self.strides) - 1)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """`(N, C, size, size)` of maps by name and boxes `(n, 4)` of each image, in pixels."""
        maps, levels = [x[name] for name in self.featmap_names], self.level(boxes)
        numbers = torch.cat([torch.full_like(box[:, :1], k) for k, box in enumerate(boxes)])
        regions = torch.cat([numbers, torch.cat(boxes)], 1)
        found = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for k, (y, stride) in enumerate(zip(maps, self.strides)):
            rows = torch.where(levels == k)[0]
            found[rows] = roi_align(y, regions[rows], self.output_size, 1 / stride, aligned=True).to(found.dtype)
        return found
