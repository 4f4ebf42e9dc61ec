"""Numbers of detectors out of range: the key, what was found, what is expected."""

import re
from functools import partial

import pytest

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.assignment import Thresholds
from penstock.lightning_modules.detection.centered import ByDistance, ByStatistics, Centered
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.free_anchor import FreeAnchor
from penstock.lightning_modules.detection.fsaf import Fsaf
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.detection.selection import Selection
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import Detector, Towers
from penstock.lightning_modules.nets.feature_pyramid import FeaturePyramid
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck
from penstock.lightning_modules.nets.torchvision_retinanet import TorchvisionRetinaNet
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone

NAN = float("nan")
retina, bags = partial(Retina, 3, Anchors(), Deltas()), partial(FreeAnchor, 3, Anchors(), Deltas())
fsaf, centered = partial(Fsaf, 3, Anchors(), Distances()), partial(Centered, 3, Anchors(), Deltas(), ByStatistics())
BAD = [
    (lambda: Selection(score=2), "selection.score: found 2, expected a number in [0, 1]"),
    (lambda: Selection(score=NAN), "selection.score: found nan, expected a number in [0, 1]"),
    (lambda: Selection(overlap=-0.1), "selection.overlap: found -0.1, expected a number in [0, 1]"),
    (lambda: Selection(most=0), "selection.most: found 0, expected at least 1"),
    (lambda: Selection(per_level=0), "selection.per_level: found 0, expected at least 1"),
    (lambda: Retina(0, Anchors(), Deltas()), "num_classes: found 0, expected at least 1"),
    (
        lambda: retina(limits=Thresholds(0.3)),
        "limits.positive: found 0.3, expected at least limits.negative=0.4",
    ),
    (lambda: retina(limits=Thresholds(1.5)), "limits.positive: found 1.5, expected a number in [0, 1]"),
    (lambda: retina(alpha=2), "host.alpha: found 2, expected a number in [0, 1]"),
    (lambda: retina(gamma=-1), "host.gamma: found -1, expected at least 0"),
    (lambda: bags(bag=0), "host.bag: found 0, expected at least 1"),
    (lambda: bags(overlap=1.1), "host.overlap: found 1.1, expected a number in [0, 1]"),
    (lambda: fsaf(factor=0), "host.factor: found 0, expected a number above 0"),
    (lambda: fsaf(factor=1.5), "host.factor: found 1.5, expected a number in [0, 1]"),
    (lambda: centered(box_weight=-1), "host.box_weight: found -1, expected at least 0"),
    (lambda: ByStatistics(0), "assign.nearest: found 0, expected at least 1"),
    (lambda: ByDistance(0), "assign.radius: found 0, expected a number above 0"),
    (lambda: Deltas((0.1, 0.1, 0.2, 0)), "coding.stds: found [0.1, 0.1, 0.2, 0], expected four numbers above 0"),
    (lambda: Towers(8, layers=0), "neck.layers: found 0, expected at least 1"),
    (lambda: Towers(8, groups=0), "neck.groups: found 0, expected a divisor of the 8 channels"),
    (lambda: PyramidConvNeck(8, layers=0), "neck.layers: found 0, expected at least 1"),
    (lambda: FeaturePyramid([8], 0), "net.channels: found 0, expected at least 1"),
    (lambda: Detector(None, Towers, retina(), 0), "net.channels: found 0, expected at least 1"),
    (lambda: TorchvisionRetinaNet(None, 3, Anchors(), 0), "net.channels: found 0, expected at least 1"),
]


@pytest.mark.parametrize(("build", "line"), BAD, ids=[line.partition(":")[0] for _, line in BAD])
def test_out_of_range(build, line):
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value) == line


LINES = {
    "model.net.host.selection.score=2": "model.net.host.selection.score: found 2, expected a number in [0, 1]",
    "model.net.host.limits.positive=0.1": (
        "model.net.host.limits.positive: found 0.1, expected at least limits.negative=0.4"
    ),
    "model.net.host.coding.stds=[1,1,0,1]": (
        "model.net.host.coding.stds: found [1.0, 1.0, 0.0, 1.0], expected four numbers above 0"
    ),
    "model.net.neck.layers=0": "model.net.neck.layers: found 0, expected at least 1",
    "model.net.channels=0": "model.net.channels: found 0, expected at least 1",
    "model.net.host.anchors.strides=[8,16]": (
        "model.net.host.anchors.strides: found [8, 16], expected [4, 8, 16], of maps [1, 2, 3] of resnet18"
    ),
    "host=null": "config error at model.net.host: no class_path, found keys of one only; expected host=atss or ",
    "net=two_stage_mobilenetv2_tf": (
        "config error at model.net: option 'host.anchors.scales' is not accepted, leave it out with host=null; "
        "TwoStageDetector takes "
    ),
}


@pytest.mark.parametrize("word", LINES)
def test_the_key_is_the_one_that_was_typed(word, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RUN_DIR", raising=False)
    assert main(["fit", "experiment=sepc_digits", word, "logger=csv", f"run_dir={tmp_path / 'run'}"]) == 2
    assert f"penstock: {LINES[word]}" in capsys.readouterr().err


def test_parts_that_are_left_out(monkeypatch, capsys):
    monkeypatch.delenv("RUN_DIR", raising=False)
    assert main(["fit", "experiment=sepc_coco", "host=null", "neck=null"]) == 2
    line = (
        "config error at model.net: 'neck', 'host' are required by Detector; expected neck=pconv or .*, host=atss or "
    )
    assert re.search(line, capsys.readouterr().err)


def test_weights_that_are_not_there(monkeypatch):
    backbone = TrainedBackbone("resnet18", weights="nowhere.pth")
    with pytest.raises(UserError, match=r"^model\.net\.backbone\.weights: no weights file nowhere\.pth"):
        backbone.load()
    backbone.weights = "hub"

    def unreachable(**options):
        raise OSError

    monkeypatch.setattr(backbone, "_create", unreachable)
    line = (
        r"^model\.net\.backbone\.weights: found hub, from which timm's resnet18 cannot .* \(OSError\); expected model"
    )
    with pytest.raises(UserError, match=line):
        backbone.load()
