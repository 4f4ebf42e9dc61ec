"""Networks of the official SEPC code of few channels, and files as it writes them."""

from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.free_anchor import FreeAnchor
from penstock.lightning_modules.detection.fsaf import Fsaf
from penstock.lightning_modules.detection.host import Host
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.nets.detector import Detector, Neck, Towers
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone

STDS = (0.1, 0.1, 0.2, 0.2)
PRESETS = {
    "pconv": {},
    "pconv_ibn": {"ibn": True},
    "sepc_lite": {"ibn": True, "lcconv_deform": True},
    "sepc": {"ibn": True, "lcconv_deform": True, "pconv_deform": True},
}
NECKS: dict[str, Neck] = {"towers": Towers}
NECKS |= {name: partial(PyramidConvNeck, lcconv_padding=0, **options) for name, options in PRESETS.items()}


def host(name: str, classes: int, legacy: bool = True) -> Host:
    extent = float(legacy)
    if name == "fsaf":
        return Fsaf(classes, Anchors(scales=(1.0,), ratios=(1.0,), legacy=legacy), Distances(extent))
    if name == "free_anchor":
        return FreeAnchor(classes, Anchors(legacy=legacy), Deltas(STDS, extent))
    return Retina(classes, Anchors(legacy=legacy), Deltas(extent=extent))


def backbone(model: str = "resnet18") -> TrainedBackbone:
    return TrainedBackbone(model, weights="random")


def small(neck: str = "sepc", name: str = "retina", classes: int = 5) -> Detector:
    """Of 8 channels, every number another than at the start."""
    torch.manual_seed(0)
    net = Detector(backbone(), NECKS[neck], host(name, classes), 8).eval()
    with torch.no_grad():
        for key, x in net.state_dict().items():
            if x.is_floating_point() and not key.startswith("backbone."):
                x += 0.05 * (torch.rand_like(x) - 0.5)
        net.head.cls.bias += 4
    return net


def official(net: Detector) -> OrderedDict[str, Tensor]:
    """Our state under the names of the official code."""
    found = OrderedDict()
    alone = "neck." if isinstance(net.neck, Towers) else "neck.0."
    for name, x in net.state_dict().items():
        part, *rest = name.split(".")
        if part == "backbone":
            rest[0] = "backbone"
        elif part == "head":
            rest = [f"bbox_head.retina_{rest[0]}", *rest[1:]]
        elif part == "neck" and rest[0] in ("cls_convs", "reg_convs"):
            rest = ["bbox_head", *rest[:2], "conv", *rest[2:]]
        elif part == "neck":
            rest = ["neck.1", *rest]
        elif rest[1] == "extra_blocks":
            rest = [f"{alone}fpn_convs.{int(rest[3]) + 3}.conv", *rest[4:]]
        else:
            kind = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}[rest[1]]
            rest = [f"{alone}{kind}.{rest[2]}.conv", *rest[4:]]
        found[".".join(rest)] = x
    return found


def write(path: Path, state: dict[str, Tensor], **meta: object) -> str:
    """As mmcv 0.4.3 writes."""
    facts = {
        "mmdet_version": "1.1.0",
        "config": "model = dict(...)",
        "CLASSES": tuple("abcde"),
        "epoch": 12,
        "iter": 87960,
    }
    groups = [{"lr": 1e-4, "momentum": 0.9, "params": [0]}]
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": groups}
    torch.save({"meta": facts | meta, "state_dict": state, "optimizer": optimizer}, path)
    return str(path)
