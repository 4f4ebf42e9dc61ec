"""One-stage detectors: backbone, feature pyramid, a neck that gives features of two tasks, and a head."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from penstock.lightning_modules.detection.host import Host, Objects, Outputs
from penstock.lightning_modules.detection.ranges import at_least
from penstock.lightning_modules.detection.selection import Found
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.feature_pyramid import FeaturePyramid
from penstock.lightning_modules.nets.map_backbone import MapBackbone

Neck = Callable[[int], nn.Module]
PRIOR = 0.01  # probability of a class that an untrained head gives


def check_strides(name: str, found: Sequence[int], backbone: MapBackbone) -> None:
    """Refuses levels whose cells are not those of a backbone's maps and, beyond these, twice as large each time.

    Raises:
        UserError: so they are; the key is called `name`.
    """
    expected = list(backbone.strides)
    while len(expected) < len(found):
        expected.append(2 * expected[-1])
    if list(found) != expected:
        raise UserError(f"{name}: found {list(found)}, expected {expected}, of {backbone.about}")


class Towers(nn.Module):
    """RetinaNet's: convolutions for each task, shared by the levels; the baseline of a pyramid convolution neck.

    Args:
        channels: Of all levels.
        layers: Of each task.
        groups: Of a group norm behind each convolution, as FCOS and ATSS have it; none without.

    Raises:
        UserError: no layer, or groups that do not divide the channels.
    """

    def __init__(self, channels: int = 256, layers: int = 4, groups: int | None = None):
        super().__init__()
        at_least(1, neck__layers=layers)
        if groups is not None and (groups < 1 or channels % groups):
            raise UserError(f"neck.groups: found {groups}, expected a divisor of the {channels} channels")
        self.cls_convs, self.reg_convs = (
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)) for _ in range(2)
        )
        self.cls_norms, self.reg_norms = (
            nn.ModuleList(nn.GroupNorm(groups, channels) if groups else nn.Identity() for _ in range(layers))
            for _ in range(2)
        )
        for conv in (*self.cls_convs, *self.reg_convs):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Features `(B, channels, H_l, W_l)` of classification and of localization, for each level."""
        found = []
        for x in pyramid:
            cls = loc = x
            for conv, norm in zip(self.cls_convs, self.cls_norms):
                cls = norm(conv(cls)).relu()
            for conv, norm in zip(self.reg_convs, self.reg_norms):
                loc = norm(conv(loc)).relu()
            found.append((cls, loc))
        return found


class Head(nn.Module):
    """A 3x3 convolution for classes, one for boxes, and one for how well a box fits where the host asks for it.

    Hosts that ask for the latter also have a trained factor of the codes of each level, as FCOS and ATSS do.

    Args:
        channels: Of the features.
        host: Says how many of each.
    """

    def __init__(self, channels: int, host: Host):
        super().__init__()
        cell = host.anchors.per_cell
        self.positive = host.positive
        self.cls = nn.Conv2d(channels, cell * host.num_classes, 3, padding=1)
        self.reg = nn.Conv2d(channels, cell * 4, 3, padding=1)
        self.quality = nn.Conv2d(channels, cell, 3, padding=1) if host.quality else None
        self.scales = nn.Parameter(torch.ones(len(host.anchors.strides))) if host.quality else None
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.cls.bias, -math.log((1 - PRIOR) / PRIOR))
        if self.positive:
            nn.init.ones_(self.reg.bias)

    def forward(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Outputs:
        codes = [self.reg(loc) for _, loc in pairs]
        if self.scales is not None:
            codes = [scale * code for scale, code in zip(self.scales, codes)]
        return Outputs(
            [self.cls(cls) for cls, _ in pairs],
            [y.relu() for y in codes] if self.positive else codes,
            None if self.quality is None else [self.quality(loc) for _, loc in pairs],
        )


class Origin(NamedTuple):
    """What another program trained weights on.

    Attributes:
        classes: Name and id of every class.
        side: Shorter side of its images.
        longest: The longer one was at most this.
        pad_multiple: They were padded to multiples of it.
        named: Whether the names are the weights' own.
    """

    classes: list[tuple[str, int]]
    side: int
    longest: int
    pad_multiple: int
    named: bool = True


class BoxNetwork(nn.Module):
    """What all detectors offer.

    Attributes:
        backbone: Loads its weights.
        num_classes: K.
        origin: Of weights of another program, if they are.
        forward_methods: What is called in the place of `forward`.
    """

    forward_methods = ("losses", "detections", "evaluated")

    backbone: MapBackbone
    num_classes: int
    origin: Origin | None = None

    def losses(self, image: Tensor, objects: Sequence[Objects], padded: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Scalars by name, to be summed up.

        Args:
            image: `(B, 3, H, W)` in [-1, 1].
            objects: Of every image.
            padded: Height and width of the images with their own padding.
        """
        raise NotImplementedError

    def detections(self, image: Tensor, sizes: Sequence[Sequence[int]], scales: Tensor) -> list[Found]:
        """Boxes of every image.

        Args:
            image: `(B, 3, H, W)` in [-1, 1].
            sizes: Height and width of the images without padding.
            scales: What boxes are divided by, `(B, 4)`.
        """
        raise NotImplementedError

    def evaluated(
        self,
        image: Tensor,
        objects: Sequence[Objects],
        padded: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        scales: Tensor,
    ) -> tuple[dict[str, Tensor], list[Found]]:
        """`losses`, of networks that have them in evaluation mode, and `detections`, of one pass."""
        return {}, self.detections(image, sizes, scales)


class Detector(BoxNetwork):
    """Images `(B, 3, H, W)` in [-1, 1] to the maps that a host makes losses and boxes of.

    Args:
        backbone: Its maps must be those of the host's finest strides.
        neck: Makes `Towers` or a `PyramidConvNeck` of so many channels.
        host: Anchors, losses and boxes.
        channels: Of the pyramid.

    Raises:
        UserError: levels of other strides, or no channels.
    """

    def __init__(self, backbone: MapBackbone, neck: Neck, host: Host, channels: int = 256):
        super().__init__()
        at_least(1, net__channels=channels)
        self.backbone, self.neck, self.host = backbone, neck(channels), host
        check_strides("host.anchors.strides", host.anchors.strides, backbone)
        coarse = len(host.anchors.strides) - len(backbone.channels)
        self.pyramid = FeaturePyramid(backbone.channels, channels, coarse)
        self.head = Head(channels, host)
        self.num_classes = host.num_classes

    def forward(self, image: Tensor) -> Outputs:
        return self.head(self.neck(self.pyramid(self.backbone(image))))

    def losses(self, image: Tensor, objects: Sequence[Objects], padded: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The host's, in float32 at least."""
        outputs = self(image).wide()
        with torch.autocast(image.device.type, enabled=False):
            return self.host.losses(outputs, objects, padded)

    def detections(self, image: Tensor, sizes: Sequence[Sequence[int]], scales: Tensor) -> list[Found]:
        """The host's, in float32 at least."""
        outputs = self(image).wide()
        with torch.autocast(image.device.type, enabled=False):
            return self.host.detections(outputs, sizes, scales)

    def evaluated(
        self,
        image: Tensor,
        objects: Sequence[Objects],
        padded: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        scales: Tensor,
    ) -> tuple[dict[str, Tensor], list[Found]]:
        """Both, see `BoxNetwork`."""
        outputs = self(image).wide()
        with torch.autocast(image.device.type, enabled=False):
            return self.host.losses(outputs, objects, padded), self.host.detections(outputs, sizes, scales)
