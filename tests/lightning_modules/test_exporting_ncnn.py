"""ncnn's files against the modules they were made of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.exporting_ncnn import exported_ncnn
from penstock.lightning_modules.fastflow import FastFlow
from penstock.lightning_modules.ncnn_runtime import loaded
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import FastFlowNet


def files(folder: Path) -> tuple[Path, Path]:
    return folder / "model.ncnn.param", folder / "model.ncnn.bin"


def detector(
    backbone: str = "mobilenetv2_050", size=(64, 96), top=0.1, blur=2.0, layers=(2, 3), **options
) -> nn.Module:
    torch.manual_seed(0)
    net = FastFlowNet(Backbone(backbone, weights="random", layers=list(layers)), size, flow_steps=2, **options)
    with torch.no_grad():
        for parameter in net.flows.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return FastFlow(net, torch.optim.Adam, top=top, blur=blur).eval().exportable()[0]


@pytest.mark.parametrize("options", [{}, {"norm": "channel", "top": 0, "blur": 0}], ids=["sample", "channel"])
@torch.no_grad()
def test_maps_are_the_same(tmp_path, options):
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    module = detector(**options).probe(image)
    assert exported_ncnn(module, image, ["score", "map"], tmp_path / "model.ncnn") == ["map"]
    assert sorted(tmp_path.iterdir()) == sorted(files(tmp_path))
    run = loaded(*files(tmp_path), outputs=1)
    for seed in (2, 3):
        image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
        expected = module(image)[1][0]
        assert expected.std() > 1e-2
        torch.testing.assert_close(torch.from_numpy(run(image[0].numpy())[0]), expected, rtol=0, atol=1e-4)


class Turned(nn.Module):
    """Picks rows by index, of which pnnx makes something else without a word."""

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (image.index_select(2, torch.tensor([1, 0, 3, 2])),)


class Summed(nn.Module):
    """Of an operator that pnnx leaves as it is."""

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (image.cumsum(3),)


@pytest.mark.parametrize("module", [Turned(), Summed()], ids=["wrong", "unknown"])
def test_what_ncnn_lacks_is_refused(tmp_path, module):
    with pytest.raises(UserError, match=r"format=ncnn: .*take format=onnx or torch"):
        exported_ncnn(module, torch.rand(1, 3, 4, 8), ["map"], tmp_path / "model.ncnn")
    assert not list(tmp_path.iterdir())


def test_an_unlike_output_hidden_by_the_exponential_is_seen(tmp_path, monkeypatch):
    """Maps of what is very anomalous are 0 whatever the flow does; the probe's are not."""
    module = detector(norm="channel")
    with torch.no_grad():
        for flow in module.flows:
            flow.weight *= 1e4
    image = torch.rand(1, 3, 64, 96)
    assert module(image)[1].abs().max() == 0
    monkeypatch.setattr("penstock.lightning_modules.exporting_ncnn.rewritten", lambda model: model)
    with pytest.raises(UserError, match="format=ncnn"):
        exported_ncnn(module, image, ["score", "map"], tmp_path / "model.ncnn")


def test_files_that_hold_an_unknown_operator(tmp_path):
    param, weights = files(tmp_path)
    param.write_text("7767517\n2 2\nInput in0 0 1 in0\nNothingOfTheKind it 1 1 in0 out0\n")
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="does not offer"):
        loaded(param, weights, outputs=1)(np.zeros((3, 4, 4), np.float32))
