"""One-stage detectors as one module of tensors alone: maps, boxes of cells, and the choice among them."""

import copy

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from penstock.lightning_modules.detection.host import rows_of, sizes_of
from penstock.lightning_modules.detection.selection import weighed
from penstock.lightning_modules.nets.batch_norm_folding import folded
from penstock.lightning_modules.nets.detector import Detector
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck


class ExportedDetector(nn.Module):
    """What `Detector.detections` gives, of a copy in evaluation mode with its norms inside of convolutions.

    Its outputs have one shape whatever is found, and its input one size.

    Args:
        net: Detector; it is not changed.
        image_size: (H, W) of the images.
    """

    any_batch = False  # boxes are chosen image by image

    def __init__(self, net: Detector, image_size: tuple[int, int]):
        super().__init__()
        net = copy.deepcopy(net).eval()
        backbone, self.pyramid, self.neck, self.head = net.backbone, net.pyramid, net.neck, net.head
        if isinstance(self.neck, PyramidConvNeck):
            self.neck = self.neck.folded()
        example = backbone.mean.new_zeros(1, 3, *image_size)
        with torch.no_grad():
            backbone.net = folded(backbone.net, lambda: backbone(example))
            backbone.mean, backbone.std = (1 + backbone.mean) / 2, backbone.std / 2  # images in [0, 1]
            logits = net(example).logits
        self.backbone, self.coding, self.selection = backbone, net.host.coding, net.host.selection
        self.num_classes, self.extent = net.num_classes, net.host.anchors.extent
        for level, prior in enumerate(net.host.anchors.grid(sizes_of(logits), example.device)):
            self.register_buffer(f"priors{level}", prior.clone())
        self.requires_grad_(False)

    def forward(self, image: Tensor, size: Tensor, original_size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes `(B, most, 4)`, scores `(B, most)`, labels `(B, most)`, and how many of them are found `(B,)`.

        The rest is 0, labels -1. Best first.

        Args:
            image: RGB `(B, 3, H, W)` in [0, 1], pictures at the upper left, 0.5 beside them.
            size: Height and width of the pictures in it, int64 `(B, 2)`.
            original_size: Of the pictures whose pixels boxes are given in, int64 `(B, 2)`.
        """
        scores, values, boxes = self.candidates(image)
        limit, original = (x.to(boxes.dtype).flip(1).repeat(1, 2) for x in (size, original_size))
        found = [self._chosen(*one) for one in zip(scores, values, boxes, limit, limit / original)]
        return tuple(torch.stack(parts) for parts in zip(*found))

    def candidates(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities and scores `(B, n, K)`, and boxes `(B, n, 4)` in pixels, of the best cells of each level."""
        outputs = self.head(self.neck(self.pyramid(self.backbone(image))))
        kept = []
        for level, (logits, code) in enumerate(
            zip(rows_of(outputs.logits, self.num_classes), rows_of(outputs.codes, 4))
        ):
            score, prior = logits.sigmoid(), self.get_buffer(f"priors{level}")
            fits = None if outputs.quality is None else [rows_of([outputs.quality[level]], 1)[0].sigmoid()]
            (value,) = weighed([score], fits)
            best = value.amax(2).topk(min(self.selection.per_level, value.shape[1]), 1).indices
            each = best.unsqueeze(2)
            wide, code = each.expand(-1, -1, score.shape[2]), code.gather(1, each.expand(-1, -1, 4))
            kept.append((score.gather(1, wide), value.gather(1, wide), self.coding.decode(prior[best], code)))
        return tuple(torch.cat(parts, 1) for parts in zip(*kept))

    def _chosen(self, score: Tensor, value: Tensor, boxes: Tensor, limit: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """What `forward` gives, of one image.

        Args:
            score: Probabilities `(n, K)`, which the threshold is on.
            value: Scores `(n, K)`.
            boxes: `(n, 4)`.
            limit: The picture's width and height, twice `(4,)`.
            scale: What boxes are divided by at the end, `(4,)`.
        """
        most, (cell, label) = self.selection.most, (score > self.selection.score).nonzero().unbind(1)
        boxes, values = boxes.clamp(min=0).minimum(limit - self.extent)[cell], value[cell, label]
        # rows that are none, two classes of their own: torchvision exports a suppression that keeps two at least
        boxes = torch.cat([boxes, boxes.new_zeros(2, 4)])
        values = torch.cat([values, values.new_zeros(2)])
        label = torch.cat([label, -1 - torch.arange(2, device=label.device)])
        reach = torch.cat([boxes[:, :2], boxes[:, 2:] + self.extent * scale[2:]], 1)
        apart = 2 * limit.max() * label.unsqueeze(1)  # boxes of two classes do not touch
        order = nms(reach + apart, values, self.selection.overlap)
        filled = [
            torch.cat([x[order], x.new_full((most, *x.shape[1:]), fill)])[:most]
            for x, fill in ((boxes / scale, 0), (values, 0), (label.clamp(min=-1), -1))
        ]
        return *filled, (filled[2] >= 0).sum()
