"""Weights of the official SEPC code (mmcv 0.4.3) under our names, and its detectors as networks."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.free_anchor import FreeAnchor
from penstock.lightning_modules.detection.fsaf import Fsaf
from penstock.lightning_modules.detection.host import Host
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import Detector, Neck, Origin, Towers
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone
from penstock.lightning_modules.weights import official

COCO = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # ids of its 80 classes
WHAT = "a checkpoint of the official SEPC code (jshilong/SEPC)"
RULES = [
    (r"backbone\.(.+)", r"backbone.net.\1"),
    (r"neck\.(?:0\.)?lateral_convs\.(\d)\.conv\.(weight|bias)", r"pyramid.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.(?:0\.)?fpn_convs\.([012])\.conv\.(weight|bias)", r"pyramid.fpn.layer_blocks.\1.0.\2"),
    (r"neck\.(?:0\.)?fpn_convs\.3\.conv\.(weight|bias)", r"pyramid.fpn.extra_blocks.convs.0.\1"),
    (r"neck\.(?:0\.)?fpn_convs\.4\.conv\.(weight|bias)", r"pyramid.fpn.extra_blocks.convs.1.\1"),
    (r"neck\.1\.((?:Pconvs|lconv|cconv|lbn|cbn)\..+)", r"neck.\1"),
    (r"bbox_head\.(cls|reg)_convs\.(\d)\.conv\.(weight|bias)", r"neck.\1_convs.\2.\3"),
    (r"bbox_head\.retina_(cls|reg)\.(weight|bias)", r"head.\1.\2"),
]
UNIVERSENET = [
    (r"neck\.1\.pconvs\.(\d+)\.pconv\.(.+)", r"neck.Pconvs.\1.Pconv.\2"),
    (r"neck\.1\.pconvs\.(\d+)\.(bn\..+)", r"neck.Pconvs.\1.\2"),
    (r"neck\.1\.bn_(l|c)(?:oc|ls)\.(.+)", r"neck.\1bn.\2"),
]
PRESETS = {
    (False, False, False): "pconv",
    (False, False, True): "pconv_ibn",
    (False, True, True): "sepc_lite",
    (True, True, True): "sepc",
}


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `nets.detector.Detector` that the official code, or its port in UniverseNet, calls otherwise.

    The official neck was trained with `lcconv_padding=0`, and boxes in the legacy pixel convention: both are options
    here. In UniverseNet the padding is an option, too, and anchors lie around the corners of cells, not their middles,
    which is none here.

    Args:
        state: The checkpoint's `state_dict`.

    Raises:
        UserError: an entry that is none of theirs.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, name in RULES + UNIVERSENET:
            if match := re.fullmatch(pattern, key):
                found[match.expand(name)] = value
                break
        else:
            raise UserError(f"weights: found '{key}', expected backbone.*, neck.* or bbox_head.* of the official SEPC")
    return found


def pretrained(
    file: str,
    backbone: TrainedBackbone,
    neck: Neck | None = None,
    host: Host | None = None,
    lcconv_padding: int = 0,
) -> Detector:
    """The detector of a checkpoint of the official code, with that code's pixel convention of boxes.

    Neck, its layers, classes and channels follow from the entries and shapes in it, and so does FSAF as host;
    RetinaNet and FreeAnchor have the same entries, and RetinaNet is taken where nothing else is asked for. In images
    smaller than their batch the official code pads with the mean colour, here it is grey. Names of classes are the
    file's, ids are COCO's or counted from 1, until data tell others.

    Args:
        file: A `.pth` of mmcv 0.4.3, or a plain state dict.
        backbone: Of the model that it was trained with, in timm's names; its weights are taken from the file.
        neck: What the file must hold; None is any.
        host: Of RetinaNet, FreeAnchor and FSAF, what the file must hold; its boxes become legacy ones.
        lcconv_padding: Of the last convolutions, which no entry shows, whatever `neck` says.

    Raises:
        UserError: the file is absent, holds other objects, another network, or another neck or host than asked for.
    """
    path = Path(file).expanduser()
    meta, content = _read(path)
    if any(re.fullmatch(pattern, key) for key in content for pattern, _ in UNIVERSENET):
        raise UserError(
            f"{path}: of UniverseNet, whose anchors lie half a stride from all of ours; expected {WHAT} "
            "(weights.sepc.converted takes its weights over)"
        )
    try:
        state = converted(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    width, cell, classes = _shapes(state, path)
    own = _neck(state, lcconv_padding, path)
    if neck is not None and (asked := _kind(neck(8).state_dict())) != _kind(_part(state, "neck.")):
        raise UserError(f"{path}: holds neck={_kind(_part(state, 'neck.'))}, found neck={asked}; expected the former")
    net = Detector(backbone, own, _host(host, cell, classes, path), width)
    _fill(net, state, path)
    backbone.weights = "random"  # those of the file stay
    ids = COCO if classes == len(COCO) else range(1, classes + 1)
    names = meta.get("CLASSES") or [f"class {k}" for k in ids]
    if len(names) != classes:
        raise UserError(f"{path}: names {len(names)} classes, but its head has {classes}")
    rows, named = [(str(name), k) for name, k in zip(names, ids)], bool(meta.get("CLASSES"))
    net.origin = Origin(rows, side=800, longest=1333, pad_multiple=32, named=named)
    return net


def _read(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Facts about the training, if there are any, and the weights."""
    try:
        content = official.read(path, WHAT)
    except UserError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise UserError(
            f"{error}; if you trust it, keep its weights alone, in Python: "
            f"torch.save({{'state_dict': torch.load('{path}', weights_only=False)['state_dict']}}, 'NEW.pth')"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"{path}: no state dict of tensors, expected {WHAT}")
    meta = content.get("meta")
    return meta if isinstance(meta, Mapping) else {}, state


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _shapes(state: Mapping[str, Tensor], path: Path) -> tuple[int, int, int]:
    """Channels of the pyramid, priors of a cell, classes."""
    cls, reg = (tuple(state[key].shape) if (key := f"head.{name}.weight") in state else () for name in ("cls", "reg"))
    if len(cls) != 4 or len(reg) != 4 or reg[0] % 4 or cls[0] % (reg[0] // 4):
        raise UserError(
            f"{path}: no head of classes and boxes in it, found bbox_head.retina_cls.weight {cls} and "
            f"retina_reg.weight {reg}; expected (A * classes, channels, 3, 3) and (A * 4, channels, 3, 3)"
        )
    cell = reg[0] // 4
    return cls[1], cell, cls[0] // cell


def _flags(neck: Mapping[str, Tensor]) -> dict[str, bool]:
    """Options of a `PyramidConvNeck` that its entries show."""
    offsets = [key for key in neck if ".conv_offset." in key]
    return {
        "pconv_deform": any(key.startswith("Pconvs.") for key in offsets),
        "lcconv_deform": any(not key.startswith("Pconvs.") for key in offsets),
        "ibn": any(re.match(r"(Pconvs\.\d+\.bn|lbn|cbn)\.", key) for key in neck),
    }


def _layers(keys: Sequence[str], prefix: str) -> int:
    return 1 + max(int(key.split(".")[1]) for key in keys if key.startswith(prefix))


def _kind(neck: Mapping[str, Tensor]) -> str:
    """Name of the preset in `conf/neck` whose entries these are, or are nearest to."""
    if any(key.startswith("cls_convs.") for key in neck):
        return "towers"
    return PRESETS.get(tuple(_flags(neck).values()), "a mixture of presets")


def _neck(state: Mapping[str, Tensor], lcconv_padding: int, path: Path) -> Neck:
    own = _part(state, "neck.")
    if any(key.startswith("Pconvs.") for key in own):
        options: dict[str, Any] = {"layers": _layers(list(own), "Pconvs."), **_flags(own)}
        return lambda channels: PyramidConvNeck(channels, lcconv_padding=lcconv_padding, **options)
    if any(key.startswith("cls_convs.") for key in own):
        return lambda channels: Towers(channels, _layers(list(own), "cls_convs."))
    raise UserError(f"{path}: no neck in it, expected neck.1.Pconvs.* of SEPC, or bbox_head.cls_convs.* of a baseline")


def _host(asked: Host | None, cell: int, classes: int, path: Path) -> Host:
    """The host asked for, or the one that the file shows, in the legacy convention."""
    kinds = {9: (Retina, FreeAnchor), 1: (Fsaf,)}
    if cell not in kinds:
        raise UserError(f"{path}: a head of {cell} priors a cell, expected 9 (retina, free_anchor) or 1 (fsaf)")
    if asked is None:
        if cell == 1:
            return Fsaf(classes, Anchors(scales=(1.0,), ratios=(1.0,), legacy=True), Distances(1.0))
        return Retina(classes, Anchors(legacy=True), Deltas(extent=1.0))
    if not isinstance(asked, kinds[cell]) or asked.anchors.per_cell != cell:
        names = "host=retina or host=free_anchor" if cell == 9 else "host=fsaf"
        raise UserError(f"{path}: a head of {names}, found {type(asked).__name__}; expected {names}")
    if asked.num_classes != classes:
        raise UserError(f"num_classes: found {asked.num_classes}, expected {classes}, those of {path}")
    old = asked.anchors
    asked.anchors, asked.coding.extent = Anchors(old.strides, old.scales, old.ratios, legacy=True), 1.0
    return asked


def _fill(net: Detector, state: Mapping[str, Tensor], path: Path) -> None:
    """Loads the state, whose entries must be all there are.

    Raises:
        UserError: they are not; the first of those missing, too many or of other shapes is named.
    """
    own, words = net.state_dict(), []
    for what, keys in (("missing", own.keys() - state.keys()), ("too many", state.keys() - own.keys())):
        if keys:
            words.append(f"{len(keys)} {what} ({sorted(keys)[0]}{', ...' if len(keys) > 1 else ''})")
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if other:
        shapes = [tuple(x[other[0]].shape) for x in (state, own)]
        words.append(f"{len(other)} of other shapes ({other[0]}: found {shapes[0]}, expected {shapes[1]})")
    if words:
        nearest = _kind(_part(state, "neck."))
        raise UserError(
            f"{path}: fits no detector of the official code; nearest is neck={nearest} on timm's "
            f"{net.backbone.model}, but of its entries, by our names, {', '.join(words)}"
        )
    net.load_state_dict(dict(state))
