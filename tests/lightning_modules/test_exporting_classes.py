"""Exported classifiers and segmenters against the models they were made of."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.datamodules.detection_transforms import Resizing
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.exporting import exported
from penstock.lightning_modules.exporting_ncnn import exported_ncnn
from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.vit import VitBranch
from penstock.lightning_modules.nets.upernet import SegmentationNet
from penstock.lightning_modules.piip import Piip
from penstock.lightning_modules.upernet import UperNet

UNIT = partial(InteractionUnit, heads=8)
OWN = {"groups": 1, "depth": 1, "num_heads": 2, "weights": "random", "patch": 8}


def shaken(model):
    """With gates that open the interactions, and norms with statistics."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.normal_(parameter, std=0.3)
    for name, value in model.named_buffers():
        if "running" in name:
            value.copy_(torch.rand_like(value) + 0.5)
    return model.eval()


def classifier() -> Piip:
    more = {"num_classes": 3, "class_token": True, "resize_table": True, **OWN}
    branches = [VitBranch("deit_tiny_patch16_224", size, embed_dim=dim, **more) for size, dim in ((32, 64), (64, 32))]
    model = Piip(PiipClassifier(branches, 3, UNIT), torch.optim.AdamW, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    model.classes = ["a", "b", "c"]
    return shaken(model)


def segmenter(**options) -> UperNet:
    """Of 0.4 times the image in a branch, which is no whole number of pixels."""
    branches = [
        VitBranch("deit_tiny_patch16_224", size, embed_dim=dim, window=2, pad="inputs", **OWN)
        for size, dim in ((32, 64), (80, 32))
    ]
    net = SegmentationNet(PiipBackbone(branches, UNIT), 3, channels=8, auxiliary_channels=8)
    model = UperNet(net, torch.optim.AdamW, **options)
    model.classes, model.resizing = ["a", "b", "c"], Resizing((64,), 100)
    return shaken(model)


def outputs(module, example: Tensor, names: list[str], kind: str, folder: Path) -> list[Tensor]:
    """What a file gives of three images."""
    file = folder / ("model.onnx" if kind == "onnx" else "model.pt2")
    exported(module, example, names, kind, file)
    image = torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    if kind == "torch":
        found = torch.export.load(str(file)).module()(image)
        return [image, *(found if isinstance(found, tuple) else (found,))]
    session = pytest.importorskip("onnxruntime").InferenceSession(str(file))
    assert [out.name for out in session.get_outputs()] == names
    return [image, *map(torch.from_numpy, session.run(None, {"image": image.numpy()}))]


def test_classifier():
    model = classifier()
    module, example, names, facts = model.exportable()
    assert (tuple(example.shape), names) == ((1, 3, 64, 64), ["probabilities"])
    assert facts["classes"] == ["a", "b", "c"]
    with torch.no_grad():
        assert (module(example) - model(2 * example - 1).softmax(1)).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_file_of_a_classifier(kind, tmp_path):
    model = classifier()
    module, example, names, _ = model.exportable()
    image, found = outputs(module, example, names, kind, tmp_path)
    with torch.no_grad():
        assert (found - model(2 * image - 1).softmax(1)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_segmenter(kind, tmp_path):
    model = segmenter()
    module, example, names, facts = model.exportable()
    assert (tuple(example.shape), names) == ((1, 3, 64, 128), ["mask", "scores"])
    assert (facts["shorter_side"], facts["longer_side_at_most"], facts["window"]) == (64, 100, None)
    image, mask, scores = outputs(module, example, names, kind, tmp_path)
    with torch.no_grad():
        expected = model(2 * image - 1)
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()
    assert mask.dtype == torch.uint8
    assert torch.equal(mask.long(), scores.argmax(1))


def test_sizes_and_classes():
    assert segmenter().exportable((50, 70))[1].shape == (1, 3, 64, 96)
    _, example, _, facts = segmenter(window=48, stride=40, pad_multiple=16).exportable()
    assert example.shape == (1, 3, 48, 48)
    assert (facts["window"], facts["stride"]) == (48, 40)
    model = segmenter()
    model.resizing = None
    with pytest.raises(UserError, match=r"training pictures is not known; expected image_size=\[H,W\]"):
        model.exportable()
    model.classes = []
    with pytest.raises(UserError, match=r"classes are not known; expected ckpt_path=FILE"):
        model.exportable((64, 64))


def test_more_weights_than_onnx_holds(tmp_path):
    with torch.device("meta"):
        module = torch.nn.Linear(2**15, 2**15)
    with pytest.raises(UserError, match=r"format=onnx: found 4\.3 GB of weights, expected less than 2; take format="):
        exported(module, torch.empty(1, 1), ["out"], "onnx", tmp_path / "model.onnx")


def test_ncnn_writes_maps_alone(tmp_path):
    module, example, names, _ = classifier().exportable()
    with pytest.raises(UserError, match=r"format=ncnn: found probabilities, expected maps among them; take format="):
        exported_ncnn(module, example, names, tmp_path / "model")
