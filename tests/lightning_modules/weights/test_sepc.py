"""Checkpoints of the official SEPC code as networks."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.coding import Deltas
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.detector import Detector, Towers
from penstock.lightning_modules.weights.sepc import converted, pretrained
from tests.box_trees import coco
from tests.official_sepc import NECKS, backbone, host, official, small, write


def universenet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        key = key.replace("Pconvs", "pconvs").replace("Pconv", "pconv")
        found[key.replace("neck.1.lbn", "neck.1.bn_loc").replace("neck.1.cbn", "neck.1.bn_cls")] = value
    return found


@pytest.mark.parametrize(("neck", "name"), [("sepc", "retina"), ("sepc_lite", "fsaf"), ("towers", "retina")])
def test_official_names_and_shapes(neck, name):
    """A state dict with the official code's names and shapes loads whole, and each entry goes where it belongs."""
    with torch.device("meta"):
        net = Detector(backbone("resnet50"), NECKS[neck], host(name, 80), 256)
    state, shapes = official(net), {}
    shapes |= {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["backbone.conv1.weight"] == (64, 3, 7, 7)
    assert shapes["backbone.layer3.5.conv2.weight"] == (256, 256, 3, 3)
    assert shapes["backbone.layer4.0.downsample.1.running_var"] == (2048,)
    first, cell = ("neck." if neck == "towers" else "neck.0."), 1 if name == "fsaf" else 9
    assert [shapes[f"{first}lateral_convs.{k}.conv.weight"][:2] for k in range(3)] == [
        (256, 512),
        (256, 1024),
        (256, 2048),
    ]
    assert [shapes[f"{first}fpn_convs.{k}.conv.weight"][1] for k in range(5)] == [256, 256, 256, 2048, 256]
    assert shapes["bbox_head.retina_cls.weight"] == (cell * 80, 256, 3, 3)
    assert shapes["bbox_head.retina_reg.bias"] == (cell * 4,)
    if neck == "towers":
        assert shapes["bbox_head.reg_convs.3.conv.weight"] == (256, 256, 3, 3)
        assert not any(key.startswith("neck.1.") for key in shapes)
    else:
        assert shapes["neck.1.Pconvs.3.Pconv.2.weight"] == (256, 256, 3, 3)
        assert shapes["neck.1.cbn.running_mean"] == shapes["neck.1.Pconvs.0.bn.weight"] == (256,)
        assert shapes["neck.1.lconv.conv_offset.weight"] == (18, 256, 3, 3)
        assert ("neck.1.Pconvs.3.Pconv.2.conv_offset.weight" in shapes) == (neck == "sepc")
    own = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in converted(state).items()} == own
    assert converted(universenet(state)).keys() == own.keys()


@pytest.mark.parametrize("name", ["retina", "free_anchor", "fsaf"])
@pytest.mark.parametrize("neck", NECKS)
def test_networks_follow_from_the_file(tmp_path, neck, name):
    expected = small(neck, name)
    file = write(tmp_path / "a.pth", official(expected))
    asked = host("free_anchor", 5, legacy=False) if name == "free_anchor" else None
    net = pretrained(file, backbone(), host=asked).eval()
    state = net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in expected.state_dict().items())
    image = torch.rand(1, 3, 288, 320) * 2 - 1
    with torch.no_grad():
        found, others = (x.detections(image, [(280, 310)], torch.full((1, 4), 0.5))[0] for x in (net, expected))
        for ys, zs in zip(net(image)[:2], expected(image)[:2]):
            assert all(torch.equal(y, z) for y, z in zip(ys, zs))
    assert len(found.boxes) > 10
    assert all(torch.equal(a, b) for a, b in zip(found[:3], others))
    assert type(net.host) is type(expected.host)
    assert net.host.anchors == expected.host.anchors
    assert net.num_classes == net.host.num_classes == 5
    assert net.backbone.weights == "random"
    assert net.origin.classes == [(name, k + 1) for k, name in enumerate("abcde")]


def test_legacy_convention_and_padding_are_told_apart(tmp_path):
    """Without them the same weights give other boxes."""
    expected = small("sepc_lite")
    net = pretrained(write(tmp_path / "a.pth", official(expected)), backbone(), NECKS["sepc_lite"]).eval()
    padded = pretrained(str(tmp_path / "a.pth"), backbone(), lcconv_padding=1).eval()
    image = torch.rand(1, 3, 288, 320) * 2 - 1
    with torch.no_grad():
        assert [tuple(y.shape[2:]) for y in net(image).codes] == [(34, 38), (16, 18), (7, 8), (3, 3), (1, 1)]
        assert [tuple(y.shape[2:]) for y in padded(image).codes] == [(36, 40), (18, 20), (9, 10), (5, 5), (3, 3)]
    assert net.host.anchors.legacy
    assert net.host.anchors.extent == net.host.coding.extent == 1


def test_a_given_host_keeps_its_selection(tmp_path):
    from penstock.lightning_modules.detection.selection import Selection

    file = write(tmp_path / "a.pth", official(small("pconv")))
    asked = Retina(5, Anchors(), Deltas(), selection=Selection(most=3))
    assert pretrained(file, backbone(), host=asked).host.selection.most == 3


def refused(match: str, file: Path | str, **options: object) -> None:
    with pytest.raises(UserError, match=match) as found:
        pretrained(str(file), backbone(), **options)
    assert str(file) in str(found.value)
    assert "\n" not in str(found.value)


def test_files_that_are_none(tmp_path):
    file, state = tmp_path / "a.pth", official(small("sepc_lite"))
    refused("no such file, expected a checkpoint of the official SEPC code", tmp_path / "none.pth")
    write(file, state, config=Fraction(1, 2))
    refused(r"refused \(.*if you trust it, keep its weights alone, in Python: torch.save\(", file)
    torch.save({"state_dict": [1]}, file)
    refused("no state dict of tensors", file)
    write(file, {**state, "rpn_head.conv.weight": torch.ones(1)})
    refused("found 'rpn_head.conv.weight', expected backbone", file)
    write(file, universenet(state))
    refused("of UniverseNet, whose anchors lie half a stride from all of ours", file)
    write(file, {k: v for k, v in state.items() if not k.startswith("bbox_head.retina_reg")})
    refused(r"no head of classes and boxes in it, found bbox_head.retina_cls.weight \(45, 8, 3, 3\) and .* \(\)", file)
    write(file, {k: v for k, v in state.items() if not k.startswith("neck.1.Pconvs")})
    refused("no neck in it, expected neck.1.Pconvs", file)
    write(file, state, CLASSES=("a", "b"))
    refused("names 2 classes, but its head has 5", file)


def test_classes_without_names(tmp_path):
    """Of 80 the ids are COCO's."""
    torch.save(official(small("pconv", "fsaf", 80)), tmp_path / "a.pth")
    found = pretrained(str(tmp_path / "a.pth"), backbone()).origin
    assert [found.classes[k] for k in (0, 11, 79)] == [("class 1", 1), ("class 13", 13), ("class 90", 90)]
    assert len(found.classes) == 80


def test_files_that_do_not_fit(tmp_path):
    file, state = tmp_path / "a.pth", official(small("sepc_lite"))
    write(file, {k: v for k, v in state.items() if k not in ("neck.1.lbn.weight", "neck.1.cconv.conv_offset.bias")})
    refused(r"nearest is neck=sepc_lite on .*resnet18, but .* 2 missing \(neck.cconv.conv_offset.bias, ...\)", file)
    write(file, {**state, "backbone.layer5.conv1.weight": torch.ones(1)})
    refused(r"1 too many \(backbone.net.layer5.conv1.weight\)", file)
    write(file, {**state, "neck.1.lconv.bias": torch.ones(7)})
    refused(r"1 of other shapes \(neck.lconv.bias: found \(7,\), expected \(8,\)\)", file)
    write(file, state)
    with pytest.raises(UserError, match=r"neck=sepc_lite on timm's resnet34, but .* missing \(backbone.net.layer1.2"):
        pretrained(str(file), backbone("resnet34"))
    refused("holds neck=sepc_lite, found neck=pconv_ibn", file, neck=NECKS["pconv_ibn"])
    refused("holds neck=sepc_lite, found neck=towers", file, neck=Towers)
    refused("a head of host=retina or host=free_anchor, found Fsaf", file, host=host("fsaf", 5))
    refused("num_classes: found 80, expected 5", file, host=host("retina", 80))
    write(file, official(small("pconv", "fsaf")))
    refused("a head of host=fsaf, found Retina; expected host=fsaf", file, host=host("retina", 5))


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Validated on images with boxes it leaves a checkpoint, which is tested and predicts."""
    tree, file = coco(tmp_path / "tree"), tmp_path / "a.pth"
    expected = small("sepc_lite", classes=3)
    write(file, official(expected), CLASSES=("cat", "dog", "toothbrush"))
    words = ["experiment=sepc_coco", "net=sepc_official", f"model.net.file={file}", "neck=sepc_lite", "num_classes=3"]
    words += ["model.net.backbone.model=resnet18", f"data.data_dir={tree}", "data.num_workers=0", "data.min_size=288"]
    words += ["data.max_size=800", "data.batch_size=2", "logger=csv"]

    def penstock(verb: str, *words: str, run: str) -> Path:
        monkeypatch.delenv("RUN_DIR", raising=False)
        assert main([verb, *words, f"run_dir={tmp_path / run}"]) == 0
        return tmp_path / run

    run = penstock("validate", *words, run="v")
    checkpoint = run / "checkpoints" / "converted.ckpt"
    model = model_from_checkpoint(checkpoint)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.net.state_dict().items())
    assert model.classes == [("cat", 2), ("dog", 7), ("toothbrush", 90)]
    assert model.resizing.sides == (288,)
    assert model.net.host.anchors.legacy
    direct = penstock("test", *words, "callbacks.cost.runs=1", run="t") / "detections" / "test.json"
    again = penstock("test", f"ckpt_path={checkpoint}", run="c") / "detections" / "test.json"
    assert direct.read_bytes() == again.read_bytes()
    assert len(json.loads(direct.read_text())) > 10
    found = penstock("predict", f"ckpt_path={checkpoint}", f"images={tree / 'test'}", run="p")
    assert json.loads((found / "predictions" / "boxes.json").read_text())["annotations"]
    write(file, official(expected), CLASSES=("dog", "cat", "brush"))
    assert main(["validate", *words, f"run_dir={tmp_path / 'other'}"]) == 2
    assert "data.classes: found 'cat' as class 0, expected 'dog', as in the weights" in capsys.readouterr().err
    write(file, official(expected), CLASSES=("cat", "dog", "toothbrush"))
    more = [word for word in words if word.startswith(("experiment", "net", "model", "neck", "num", "logger"))]
    more += ["data=pictures", f"data.data_dir={tree / 'test'}"]
    found = penstock("predict", *more, run="d")
    boxes = json.loads((found / "predictions" / "boxes.json").read_text())
    assert boxes["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "toothbrush"}]
    assert boxes["annotations"]
