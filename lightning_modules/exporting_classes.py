"""What `penstock export` writes of classifiers and of segmenters."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from penstock.datamodules.detection_transforms import Resizing
from penstock.lightning_modules.class_masks import resized_scores
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.upernet import SegmentationNet

Exportable = tuple[nn.Module, Tensor, list[str], dict[str, Any]]


class ExportedClassifier(nn.Module):
    """Probabilities of classes, by a copy of a network.

    Args:
        net: Normalised images to logits.
        mean: Of RGB values in [0, 1], `(C, 1, 1)`.
        std: Likewise.
    """

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, image: Tensor) -> Tensor:
        """`(B, K)` of images `(B, C, H, W)` in [0, 1]."""
        return self.net((image - self.mean) / self.std).softmax(1)


class ExportedSegmenter(nn.Module):
    """Classes of pixels and their scores, by a copy of a network.

    Args:
        net: Its second head, which only trains, is left out.
    """

    def __init__(self, net: SegmentationNet):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.net.auxiliary = None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Classes uint8 `(B, H, W)` and scores `(B, K, H, W)` of images `(B, 3, H, W)` in [0, 1]."""
        scores = resized_scores(self.net(2 * image - 1)[0], tuple(image.shape[2:]))
        return scores.argmax(1).to(torch.uint8), scores


def exportable_classifier(net: nn.Module, mean: Tensor, std: Tensor, classes: list[str], shape: tuple) -> Exportable:
    """A module, an example of its input, names of its outputs, and facts that a program using it needs.

    Args:
        net: See `ExportedClassifier`, as of `mean` and `std`.
        mean: Likewise.
        std: Likewise.
        classes: Their names.
        shape: `(C, H, W)` of images.

    Raises:
        UserError: classes that are not known.
    """
    facts = {"image": f"{_colours(shape[0])} in [0, 1]", "resize": "bilinear, antialiased", **_named(classes)}
    return ExportedClassifier(net, mean, std).eval(), torch.rand(1, *shape), ["probabilities"], facts


def exportable_segmenter(
    net: SegmentationNet,
    classes: list[str],
    resizing: Resizing | None,
    pad_multiple: int,
    window: int | None,
    stride: int | None,
    image_size: tuple[int, int] | None = None,
) -> Exportable:
    """As `exportable_classifier`, of a network that scores pixels.

    Args:
        net: See `ExportedSegmenter`.
        classes: Their names.
        resizing: Of pictures.
        pad_multiple: Sides of the input are rounded up to a multiple of it.
        window: Side of windows in which images are seen; None as a whole.
        stride: From one window to the next.
        image_size: (H, W) of the input; None is a window, or the largest picture that lies.

    Raises:
        UserError: classes or sizes that are not known.
    """
    named = _named(classes)
    if image_size is None:
        if window is None and resizing is None:
            raise UserError("export: the size of the training pictures is not known; expected image_size=[H,W]")
        image_size = (resizing.sides[-1], resizing.longest) if window is None else (window, window)
    height, width = (-(-side // pad_multiple) * pad_multiple for side in image_size)
    facts = {
        "image": "RGB in [0, 1], the resized picture at the upper left, 0.5 right of it and below",
        "resize": "bilinear, antialiased, aspect kept, to 8 bits a channel",
        "shorter_side": resizing.sides[-1] if resizing else None,
        "longer_side_at_most": resizing.longest if resizing else None,
        "window": window,
        "stride": stride,
        "mask": "numbers of classes, counted from 0, uint8",
        "scores": "of each class, not normed; where windows overlap their mean decides",
        **named,
    }
    return ExportedSegmenter(net).eval(), torch.rand(1, 3, height, width), ["mask", "scores"], facts


def _colours(channels: int) -> str:
    return "RGB" if channels == 3 else "grey"


def _named(classes: list[str]) -> dict[str, list[str]]:
    """The classes as a fact.

    Raises:
        UserError: none is known.
    """
    if not classes:
        raise UserError("export: the model's classes are not known; expected ckpt_path=FILE of a trained model")
    return {"classes": list(classes)}
