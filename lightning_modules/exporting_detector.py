"""What `penstock export` writes of detectors."""

from typing import Any

import torch
from torch import Tensor, nn

from penstock.datamodules.detection_transforms import Resizing
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import BoxNetwork, Detector
from penstock.lightning_modules.nets.exported_detector import ExportedDetector

OUTPUTS = ["boxes", "scores", "labels", "count"]


def exportable_detector(
    net: BoxNetwork,
    classes: list[tuple[str, int]],
    resizing: Resizing | None,
    pad_multiple: int,
    image_size: tuple[int, int] | None = None,
) -> tuple[nn.Module, dict[str, Tensor], list[str], dict[str, Any]]:
    """A module, an example of its inputs, names of its outputs, and facts that a program using it needs.

    Args:
        net: Detector.
        classes: Name and id of every class.
        resizing: Of pictures.
        pad_multiple: Sides of the input are rounded up to a multiple of it.
        image_size: (H, W) of the input; None is that of the largest picture that lies.

    Raises:
        UserError: a detector that can't be exported, or classes or sizes that are not known.
    """
    if not isinstance(net, Detector):
        raise UserError(
            f"export: {type(net).__name__} can't be exported, for torchvision chooses its boxes by loops whose length "
            "depends on the picture; expected a one-stage detector of nets.detector.Detector (net=detector_...)"
        )
    if not classes:
        raise UserError("export: the detector's classes are not known; expected ckpt_path=FILE of a trained detector")
    if image_size is None:
        if resizing is None:
            raise UserError("export: the size of the training pictures is not known; expected image_size=[H,W]")
        image_size = resizing.sides[-1], resizing.longest
    height, width = (-(-side // pad_multiple) * pad_multiple for side in image_size)
    example = {
        "image": torch.rand(1, 3, height, width),
        "size": torch.tensor([[height, width]]),
        "original_size": torch.tensor([[height, width]]),
    }
    selection = net.host.selection
    facts = {
        "image": "RGB in [0, 1], the resized picture at the upper left, 0.5 right of it and below",
        "resize": "bilinear, antialiased, aspect kept, to 8 bits a channel",
        "shorter_side": resizing.sides[-1] if resizing else None,
        "longer_side_at_most": resizing.longest if resizing else None,
        "size": "height and width of the resized picture, at most those of the input",
        "original_size": "height and width of the picture in whose pixels boxes are given",
        "boxes": "x1, y1, x2, y2 in pixels of original_size, best first; behind the first count ones they are 0",
        "labels": "numbers of classes, counted from 0, int64; -1 behind the first count ones",
        "classes": [{"name": name, "id": number} for name, number in classes],
        "nms": True,
        "score_threshold": selection.score,
        "overlap_threshold": selection.overlap,
        "cells_per_level": selection.per_level,
        "boxes_at_most": selection.most,
    }
    return ExportedDetector(net, (height, width)).eval(), example, OUTPUTS, facts
