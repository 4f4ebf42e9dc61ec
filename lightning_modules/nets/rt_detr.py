"""A DETR with DINO's queries and denoising (arXiv 2203.03605), as RT-DETR (2304.08069) has them in transformers."""

import importlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.detection.ranges import at_least
from penstock.lightning_modules.detection.selection import Found
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import BoxNetwork
from penstock.lightning_modules.nets.map_backbone import MapBackbone

LEVELS = 3
PARTS = {"loss_vfl": "class", "loss_bbox": "box", "loss_giou": "giou"}


class Maps(nn.Module):
    """Maps of a backbone as transformers asks for them.

    Args:
        backbone: With three maps.
    """

    def __init__(self, backbone: MapBackbone):
        super().__init__()
        self.backbone, self.intermediate_channel_sizes = backbone, list(backbone.channels)

    def forward(self, image: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x, mask) for x in self.backbone(image)]


class RtDetrDetector(BoxNetwork):
    """Images `(B, 3, H, W)` in [-1, 1] to boxes, by queries that see three maps; nothing is suppressed.

    Images are padded at the right and bottom, and what is padded counts as part of them.

    Args:
        backbone: With three maps, each half as large as the one before; sides of batches must be multiples of the last
            one's stride.
        num_classes: K.
        channels: Of queries and maps, a multiple of 8.
        queries: Boxes of an image.
        layers: Of the decoder.
        hidden: Width of hidden layers.
        denoising: Queries made of marked boxes with noise, in training; 0 is none.
        most: Boxes that are given, the best.

    Raises:
        UserError: transformers is absent, other maps, or a number out of range; on a call, sides that do not fit.
    """

    def __init__(
        self,
        backbone: MapBackbone,
        num_classes: int,
        channels: int = 256,
        queries: int = 300,
        layers: int = 6,
        hidden: int = 1024,
        denoising: int = 100,
        most: int = 100,
    ):
        super().__init__()
        at_least(1, net__num_classes=num_classes, net__queries=queries, net__layers=layers, net__most=most)
        if channels < 8 or channels % 8:
            raise UserError(f"net.channels: found {channels}, expected a multiple of 8")
        if len(backbone.channels) != LEVELS:
            raise UserError(
                f"net.backbone: found {len(backbone.channels)} maps, expected {LEVELS}: model.net.backbone.maps=3 of a "
                "pyramid, model.net.backbone.layers=[2,3,4] of others"
            )
        self.num_classes, self.most, self.stride = num_classes, min(most, queries * num_classes), backbone.strides[-1]
        self.net = _network(
            list(backbone.channels),
            num_labels=num_classes,
            d_model=channels,
            encoder_hidden_dim=channels,
            encoder_in_channels=[channels] * LEVELS,
            decoder_in_channels=[channels] * LEVELS,
            feat_strides=list(backbone.strides),
            encoder_ffn_dim=hidden,
            decoder_ffn_dim=hidden,
            decoder_layers=layers,
            num_queries=queries,
            num_denoising=denoising,
        )
        self.net.model.backbone = Maps(backbone)

    @property
    def backbone(self) -> MapBackbone:
        return self.net.model.backbone.backbone

    def losses(self, image: Tensor, objects: Sequence[Objects], padded: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Losses of classes, of boxes and of their overlap, over all layers and the denoising, scalars by name."""
        sides = image.new_tensor([image.shape[3], image.shape[2]] * 2)
        targets = [
            {"class_labels": one.labels, "boxes": box_convert(one.boxes, "xyxy", "cxcywh") / sides} for one in objects
        ]
        found: dict[str, Any] = defaultdict(int)
        for name, value in self._run(image, targets).loss_dict.items():
            found[next(part for start, part in PARTS.items() if name.startswith(start))] += value
        return dict(found)

    def detections(self, image: Tensor, sizes: Sequence[Sequence[int]], scales: Tensor) -> list[Found]:
        """Boxes of every image, see `BoxNetwork`, cut at its edges."""
        outputs = self._run(image)
        scores, cells = outputs.logits.float().sigmoid().flatten(1).topk(self.most, 1)
        query, labels = cells // self.num_classes, cells % self.num_classes
        boxes = outputs.pred_boxes.float().gather(1, query.unsqueeze(2).expand(-1, -1, 4))
        boxes = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([image.shape[3], image.shape[2]] * 2)
        ends = boxes.new_tensor([[w, h, w, h] for h, w in sizes]).unsqueeze(1)
        boxes = torch.minimum(boxes.clamp(min=0), ends) / scales.unsqueeze(1)
        return [Found(*one) for one in zip(boxes, scores, labels)]

    def _run(self, image: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        if any(side % self.stride for side in image.shape[2:]):
            height, width = image.shape[2:]
            raise UserError(
                f"data.pad_multiple: found a batch of {width}x{height} pixels, expected multiples of {self.stride}"
            )
        return self.net(pixel_values=image, labels=targets)


def _network(channels: list[int], **config: Any) -> nn.Module:
    """transformers' network of random weights, with a small backbone of such channels in the place of one."""
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError("RtDetrDetector: transformers is missing; install it: pip install 'penstock[detr]'") from error
    stand_in = library.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, *channels],
        depths=[1, 1, 1, 1],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    return library.RTDetrForObjectDetection(library.RTDetrConfig(backbone_config=stand_in, **config))
