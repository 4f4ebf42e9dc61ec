"""Exported detectors against the models they were made of, by what `model.json` says of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.datamodules.detection_transforms import Resizing
from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.centered import ByDistance, ByStatistics, Centered
from penstock.lightning_modules.detection.coding import Deltas, Distances
from penstock.lightning_modules.detection.free_anchor import FreeAnchor
from penstock.lightning_modules.detection.fsaf import Fsaf
from penstock.lightning_modules.detection.host import Host
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.detection.selection import Selection
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.exporting import exported
from penstock.lightning_modules.exporting_detector import OUTPUTS
from penstock.lightning_modules.nets.detector import Detector, Towers
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone
from penstock.lightning_modules.nets.two_stage import TwoStageDetector
from penstock.lightning_modules.sepc import Sepc
from penstock.lightning_modules.weights.sepc import pretrained
from tests.official_sepc import backbone as plain
from tests.official_sepc import official, small, write

SIZE = (96, 128)  # of the input
NAMES = ["image", "size", "original_size"]
SOME = {"selection": Selection(per_level=60, score=0.3, overlap=0.5, most=50)}


def host(name: str) -> Host:
    one = Anchors(scales=[1.0], ratios=[1.0])
    if name == "retina":
        return Retina(3, Anchors(strides=[8, 16, 32, 64], scales=[2.0, 3.0]), Deltas(), **SOME)
    if name == "legacy":
        return FreeAnchor(3, Anchors(scales=[2.0], legacy=True), Deltas((0.1, 0.1, 0.2, 0.2), extent=1.0), **SOME)
    if name == "atss":
        return Centered(3, Anchors(scales=[8.0], ratios=[1.0]), Deltas(), ByStatistics(), **SOME)
    return Fsaf(3, one, Distances(), **SOME) if name == "fsaf" else Centered(3, one, Distances(), ByDistance(), **SOME)


def neck(name: str, channels: int) -> torch.nn.Module:
    if name == "towers":
        return Towers(channels, layers=1)
    return PyramidConvNeck(channels, 1, name == "sepc", name in ("sepc", "sepc_lite"), ibn=name != "pconv")


@torch.no_grad()
def detector(host_name: str, neck_name: str) -> Sepc:
    """Untrained, with weights that give many boxes above the threshold, offsets of pixels, and norms that do much."""
    torch.manual_seed(0)
    backbone = TrainedBackbone("mobilenetv2_035", weights="random", pad_type="same")
    net = Detector(backbone, lambda channels: neck(neck_name, channels), host(host_name), channels=8)
    for name, parameter in [*net.neck.named_parameters(), *net.head.named_parameters()]:
        if "conv_offset" in name:
            parameter.normal_(std=0.3)
        elif parameter.ndim == 4:
            parameter.normal_(std=0.15)
        elif name == "scales" or ("bn" in name and name.endswith("weight")):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(std=0.2)
    for name, buffer in net.neck.named_buffers():
        if buffer.ndim:
            buffer.copy_(torch.rand_like(buffer) + 0.5 if "var" in name else 0.2 * torch.randn_like(buffer))
    model = Sepc(spread(net.eval(), pictures()[0]["image"]), torch.optim.Adam).eval()
    model.classes, model.resizing, model.pad_multiple = [("a", 7), ("b", 3), ("c", 5)], Resizing((90,), 128), 32
    return model


@torch.no_grad()
def spread(net: Detector, image: Tensor) -> Detector:
    """The net with a head that finds many boxes in an image, none as sure as another."""
    outputs = net(2 * image - 1)
    for conv, maps, width, middle in (
        (net.head.cls, outputs.logits, 1.5, -1.0),
        (net.head.reg, outputs.codes, 0.4, 2.0 if net.head.positive else 0.0),
    ):
        conv.weight *= width / torch.cat([y.flatten() for y in maps]).std()
        conv.bias.normal_(middle, 0.1)
    return net


def pictures() -> list[dict[str, Tensor]]:
    """Of smooth noise as large as the input, and of finer noise within it."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size, original, cells in (((96, 128), (192, 256), (6, 8)), ((72, 100), (36, 75), (12, 20))):
        image = torch.full((1, 3, *SIZE), 0.5)
        noise = torch.rand(1, 3, *cells, generator=generator)
        image[..., : size[0], : size[1]] = torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 1)
        found.append({"image": image, "size": torch.tensor([size]), "original_size": torch.tensor([original])})
    return found


def check(found: list[Tensor], model: Sepc, given: dict[str, Tensor]) -> list[int]:
    """That outputs are those of `predict_step`; how many boxes each image has."""
    with torch.no_grad():
        batch = {**given, "image": 2 * given["image"] - 1, "index": torch.arange(len(given["image"]))}
        expected = model.predict_step(batch, 0)
    boxes, scores, labels, counts = found
    most, side = model.net.host.selection.most, given["original_size"].max().item()
    assert (boxes.shape, labels.shape) == ((len(batch["image"]), most, 4), (len(batch["image"]), most))
    for k, count in enumerate(counts.tolist()):
        assert count == len(expected["scores"][k])
        torch.testing.assert_close(scores[k, :count], expected["scores"][k], rtol=0, atol=2e-4)
        torch.testing.assert_close(boxes[k, :count], expected["boxes"][k], rtol=0, atol=2e-4 * side)
        assert labels[k, :count].tolist() == expected["labels"][k].tolist()
        assert not boxes[k, count:].any()
        assert not scores[k, count:].any()
        assert (labels[k, count:] == -1).all()
    return counts.tolist()


def suppressed(model: Sepc, given: dict[str, Tensor]) -> int:
    """How many boxes of the first image fall to better ones of their class."""
    selection = model.net.host.selection
    counts = []
    for overlap in (1.0, selection.overlap):
        model.net.host.selection = Selection(selection.per_level, selection.score, overlap, most=10**6)
        with torch.no_grad():
            counts.append(
                len(model.predict_step({**given, "image": 2 * given["image"] - 1, "index": 0}, 0)["scores"][0])
            )
    model.net.host.selection = selection
    return counts[0] - counts[1]


PAIRS = {"retina": "sepc", "atss": "sepc", "fcos": "sepc_lite", "fsaf": "towers", "legacy": "pconv"}


@pytest.mark.parametrize("name", PAIRS)
def test_the_module_gives_the_same(name):
    model = detector(name, PAIRS[name])
    _, example, _, _ = model.exportable()
    assert tuple(example["image"].shape) == (1, 3, *SIZE)
    both = {key: torch.cat([one[key] for one in pictures()]) for key in NAMES}
    assert suppressed(model, pictures()[0]) > 20
    both["image"] = both["image"].double()
    model.double()
    counts = check(model.exportable()[0](*both.values()), model, both)
    assert min(counts) > 5


def file_of(
    model: Sepc, folder: Path, kind: str, batch: int = 1, size: tuple[int, int] | None = None
) -> Callable[..., Sequence[Tensor]]:
    """What an exported file computes."""
    module, example, outputs, _ = model.exportable(size)
    file = folder / "model.pt2"
    exported(module, example, outputs, kind, file, batch)
    if kind == "torch":
        return torch.export.load(file).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda *given: [
        torch.from_numpy(x) for x in session.run(OUTPUTS, dict(zip(NAMES, (y.numpy() for y in given))))
    ]


@pytest.mark.parametrize(("name", "kind"), [("retina", "onnx"), ("fcos", "torch")])
def test_files_give_the_same(tmp_path, name, kind):
    model = detector(name, PAIRS[name])
    run = file_of(model, tmp_path, kind)
    for given in pictures():
        assert min(check(run(*given.values()), model, given)) > 5


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_files_of_two_images_and_of_no_box(tmp_path, kind):
    """The first picture has boxes, the second none, for its scores stay below the threshold."""
    model = detector("fsaf", "towers")
    both = {key: torch.cat([one[key] for one in pictures()]) for key in NAMES}
    both["image"][1] = 0.5
    with torch.no_grad():
        logits = [y.amax((1, 2, 3)) for y in model.net(2 * both["image"] - 1).logits]
        first, second = torch.stack(logits).amax(0)
        model.net.head.cls.bias += -1 - (first + second) / 2
    assert first > second + 0.5
    counts = check(file_of(model, tmp_path, kind, batch=2)(*both.values()), model, both)
    assert counts[0] > 0 == counts[1]


@pytest.mark.parametrize(("name", "kind"), [("sepc_lite", "onnx"), ("towers", "torch")])
def test_files_of_official_weights(tmp_path, name, kind):
    """With their pixel convention, and the border that their last convolutions take off the maps."""
    net = pretrained(write(tmp_path / "official.pth", official(small(name))), plain()).eval()
    assert net.host.anchors.legacy
    net.host.selection = SOME["selection"]
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 24, generator=generator), (288, 320), mode="bicubic")
    sizes = {"size": torch.tensor([[280, 320]]), "original_size": torch.tensor([[560, 640]])}
    given = {"image": image.clamp(0, 1), **sizes}
    given["image"][..., 280:, :] = 0.5
    model = Sepc(spread(net, given["image"]), torch.optim.Adam).eval()
    (count,) = check(file_of(model, tmp_path, kind, size=(288, 320))(*given.values()), model, given)
    assert count > 5


def test_what_cannot_be_exported_says_why():
    backbone = TrainedBackbone("mobilenetv2_035", layers=[1, 2, 3, 4], weights="random")
    model = Sepc(TwoStageDetector(backbone, 3, channels=8, hidden=8), torch.optim.Adam)
    with pytest.raises(UserError, match="TwoStageDetector can't be exported"):
        model.exportable()
    model = detector("fcos", "towers")
    model.resizing = None
    with pytest.raises(UserError, match=r"image_size=\[H,W\]"):
        model.exportable()
    assert tuple(model.exportable((64, 70))[1]["image"].shape) == (1, 3, 64, 96)
    model.classes = []
    with pytest.raises(UserError, match="classes are not known"):
        model.exportable((64, 64))
