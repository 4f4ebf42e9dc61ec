"""One-stage detectors: what trains, and what heads start from."""

from functools import partial

import pytest
import torch

from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.centered import ByDistance, ByStatistics, Centered
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.free_anchor import FreeAnchor
from penstock.lightning_modules.detection.fsaf import Fsaf
from penstock.lightning_modules.detection.host import Host, Objects
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import Detector, Neck, Towers
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone

SQUARE = Anchors(scales=(1.0,), ratios=(1.0,))
ONE_LAYER = partial(Towers, layers=1)
HOSTS = {
    "retina": lambda: Retina(3, Anchors(), Deltas()),
    "fsaf": lambda: Fsaf(3, SQUARE, Distances()),
    "fcos": lambda: Centered(3, SQUARE, Distances(), ByDistance()),
}

ALL_HOSTS = HOSTS | {
    "free_anchor": lambda: FreeAnchor(3, Anchors(), Deltas()),
    "atss": lambda: Centered(3, Anchors(scales=(8.0,), ratios=(1.0,)), Deltas(), ByStatistics()),
}
NONE = Objects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))


def detector(host: Host, neck: Neck = ONE_LAYER, channels: int = 16, model: str = "resnet18") -> Detector:
    torch.manual_seed(0)
    return Detector(TrainedBackbone(model, weights="random"), neck, host, channels)


@pytest.mark.parametrize("name", HOSTS)
def test_shapes_and_start(name):
    net = detector(HOSTS[name](), partial(PyramidConvNeck, layers=1, pconv_deform=True, lcconv_deform=True, ibn=True))
    logits, codes, quality = net(torch.rand(2, 3, 96, 128) * 2 - 1)
    cells, anchors = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)], net.host.anchors.per_cell
    assert [tuple(y.shape) for y in logits] == [(2, 3 * anchors, *size) for size in cells]
    assert [tuple(y.shape) for y in codes] == [(2, 4 * anchors, *size) for size in cells]
    assert (quality is None) == (name != "fcos")
    start = torch.cat([y.sigmoid().flatten() for y in logits])
    assert start.mean().sub(0.01).abs() < 1e-3
    assert start.sub(0.01).abs().max() < 0.01
    if net.head.positive:
        assert torch.cat([y.flatten() for y in codes]).sub(1).abs().mean() < 0.1


def test_codes_of_a_level_have_a_factor():
    net = detector(HOSTS["fcos"]())
    image = torch.rand(1, 3, 96, 128) * 2 - 1
    with torch.no_grad():
        before = net(image)
        net.head.scales[1] = 3
        after = net(image)
    assert [round(float((b / a).mean()), 4) for a, b in zip(before.codes, after.codes)] == [1, 3, 1, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits))
    sum(y.sum() for y in net(image).codes).backward()
    assert net.head.scales.grad.ne(0).all()
    assert detector(HOSTS["retina"]()).head.scales is None


def test_towers_with_group_norm():
    torch.manual_seed(0)
    towers = Towers(8, layers=2, groups=4).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    cls, loc = towers([x])[0]
    for found, convs in ((cls, towers.cls_convs), (loc, towers.reg_convs)):
        y = x
        for conv in convs:
            y = conv(y)
            parts = y.reshape(2, 4, -1)
            parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
            y = parts.reshape(y.shape).clamp(min=0)
        assert (found - y).abs().max() < 1e-10
    assert not torch.equal(cls, loc)
    with pytest.raises(UserError, match=r"neck\.groups: found 3, expected a divisor of the 8 channels"):
        Towers(8, groups=3)


@pytest.mark.parametrize(
    ("model", "frozen", "first"),
    [
        ("resnet18", 1, "layer2.0.conv1.weight"),
        ("resnet18", 0, "layer1.0.conv1.weight"),
        ("mobilenetv2_100", 1, "blocks.2.0.conv_pw.weight"),
        ("mobilenetv2_100", 2, "blocks.3.0.conv_pw.weight"),
        ("mobilenetv2_100", -1, "conv_stem.weight"),
    ],
)
def test_what_trains(model, frozen, first):
    backbone = TrainedBackbone(model, frozen=frozen, weights="random").train()
    trained = [name for name, p in backbone.net.named_parameters() if p.requires_grad]
    assert trained[0] == first
    names = [name for name, _ in backbone.net.named_parameters()]
    assert trained == names[names.index(first) :]
    before = {name: x.clone() for name, x in backbone.net.named_buffers()}
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert [y.shape[-1] for y in maps] == [8, 4, 2]
    sum(y.square().mean() for y in maps).backward()
    assert all(torch.equal(x, before[name]) for name, x in backbone.net.named_buffers())
    grads = [name for name, p in backbone.net.named_parameters() if p.grad is not None]
    assert grads == trained


def test_norms_of_what_trains():
    backbone = TrainedBackbone("resnet18", frozen=1, norm_eval=False, weights="random").train()
    before = {name: x.clone() for name, x in backbone.net.named_buffers()}
    backbone(torch.rand(2, 3, 64, 64))
    moved = {name for name, x in backbone.net.named_buffers() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if name.startswith(("layer2", "layer3", "layer4"))}
    backbone.eval()
    before = {name: x.clone() for name, x in backbone.net.named_buffers()}
    backbone(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(x, before[name]) for name, x in backbone.net.named_buffers())


def test_numbers_that_are_no_maps():
    with pytest.raises(UserError, match=r"backbone.frozen: found 9, expected -1 to 4 of resnet18"):
        TrainedBackbone("resnet18", frozen=9, weights="random")


@pytest.mark.parametrize("name", ALL_HOSTS)
@pytest.mark.parametrize("empty", [1, 2])
def test_losses_and_boxes_of_one_pass(name, empty, monkeypatch):
    """In evaluation mode, also of images without objects."""
    net = detector(ALL_HOSTS[name](), partial(PyramidConvNeck, layers=1, ibn=True)).eval()
    torch.nn.init.constant_(net.head.cls.bias, 1.0)
    image, sizes, padded = torch.rand(2, 3, 96, 128) * 2 - 1, [(90, 128), (96, 100)], [(96, 128), (96, 128)]
    some = Objects(torch.tensor([[10.0, 10, 50, 60], [40, 20, 110, 80]]), torch.tensor([2, 0]))
    objects, scales = [*[some] * (2 - empty), *[NONE] * empty], torch.ones(2, 4)
    with torch.inference_mode():
        expected, boxes = net.losses(image, objects, padded), net.detections(image, sizes, scales)
        calls, forward = [], Detector.forward
        monkeypatch.setattr(Detector, "forward", lambda *given: calls.append(1) or forward(*given))
        losses, found = net.evaluated(image, objects, padded, sizes, scales)
    assert len(calls) == 1
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[key], expected[key]) and losses[key].isfinite() for key in losses)
    assert len(found[0].boxes) > 5
    assert all(torch.equal(a, b) for one, other in zip(found, boxes) for a, b in zip(one[:3], other))


@pytest.mark.parametrize("name", ALL_HOSTS)
def test_all_weights_have_gradients_of_images_without_objects(name):
    """As other ranks, which may see some, wait for them."""
    net = detector(ALL_HOSTS[name](), partial(PyramidConvNeck, layers=1))
    sum(net.losses(torch.rand(1, 3, 64, 64), [NONE], [(64, 64)]).values()).backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("strides", "line"),
    [
        (
            (4, 8, 16, 32, 64),
            r"found .*, expected \[8, 16, 32, 64, 128\], of maps \[2, 3, 4\] of resnet18",
        ),
        ((8, 16, 33), r"found \[8, 16, 33\], expected \[8, 16, 32\]"),
        ((8, 16), r"found \[8, 16\], expected \[8, 16, 32\]"),
    ],
)
def test_anchors_of_other_cells_than_the_maps(strides, line):
    with pytest.raises(UserError, match=r"host\.anchors\.strides: " + line):
        detector(Retina(3, Anchors(strides), Deltas()))


def test_conventions_that_do_not_fit():
    with pytest.raises(UserError, match=r"coding\.extent=1 with anchors\.legacy=false, expected extent=1 and"):
        Fsaf(3, SQUARE, Distances(1.0))
    for name in ("strides", "scales", "ratios"):
        with pytest.raises(UserError, match=rf"anchors\.{name}: found \[\], expected numbers above 0"):
            Anchors(**{name: ()})
    with pytest.raises(UserError, match=r"anchors\.scales: found \[-1\]"):
        Anchors(scales=(-1,))


HOSTS_OF_ALL = {**HOSTS, "free_anchor": lambda: FreeAnchor(3, Anchors(), Deltas())}


@pytest.mark.parametrize("name", HOSTS_OF_ALL)
def test_half_precision_ends_at_the_head(name, monkeypatch):
    """Under autocast losses and boxes are those of the head's maps in float32."""
    net = detector(HOSTS_OF_ALL[name]())
    image = torch.rand(1, 3, 96, 128) * 2 - 1
    objects = [Objects(torch.tensor([[10.0, 12.0, 60.0, 70.0], [50.0, 20.0, 110.0, 90.0]]), torch.tensor([0, 2]))]
    seen = []
    losses = net.host.losses

    def watched(outputs, *rest):
        seen.extend([*outputs.logits, *outputs.codes, *(outputs.quality or [])])
        assert not torch.is_autocast_enabled("cpu")
        return losses(outputs, *rest)

    monkeypatch.setattr(net.host, "losses", watched)
    with torch.autocast("cpu", torch.bfloat16):
        maps = net(image)
        found = net.losses(image, objects, [(96, 128)])
        boxes = net.detections(image, [(96, 128)], torch.ones(1, 4))[0]
    assert {y.dtype for y in maps.logits} == {torch.bfloat16}
    assert {y.dtype for y in seen} == {torch.float32}
    assert all(value.dtype == torch.float32 and value.isfinite() for value in found.values())
    assert boxes.boxes.dtype == torch.float32
    expected = losses(maps.wide(), objects, [(96, 128)])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
