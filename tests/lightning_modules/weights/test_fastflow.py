"""Checkpoints of public FastFlow code as networks."""

import pytest
import torch

from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import FastFlowNet
from penstock.lightning_modules.weights.fastflow import converted, pretrained
from tests.anomaly_trees import mvtec


def backbone() -> Backbone:
    return Backbone("mobilenetv2_035", layers=[2, 3], weights="random")


def public(net: FastFlowNet, flows: str = "nf_flows", convs: tuple[int, int] = (0, 2)) -> dict[str, torch.Tensor]:
    """Our state under the names of public code."""
    state = {}
    for key, value in net.state_dict().items():
        if key.startswith("flows."):
            _, flow, _, step, *rest = key.split(".")
            if rest[0] == "subnet":
                rest[1] = str(convs[int(rest[1]) // 2])
            if rest[0] == "perm":
                rest, value = ["w_perm"], torch.eye(len(value))[value][..., None, None]
            elif rest[0].startswith("global_"):
                value = value.view(1, -1, 1, 1)
            state[f"{flows}.{flow}.module_list.{step}.{'.'.join(rest)}"] = value
        else:
            state[key.replace("backbone.net.", "feature_extractor.")] = value
    return state


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"flow_steps": 3}, {}),
        ({"flow_steps": 2, "conv3x3_only": True, "hidden_ratio": 0.16, "norm": None}, {"flows": "nf_flows"}),
        ({"flow_steps": 2}, {"flows": "model.fast_flow_blocks", "convs": (1, 4)}),
    ],
    ids=["gathierry", "no-norm", "anomalib"],
)
def test_networks_follow_from_the_file(tmp_path, options, names):
    torch.manual_seed(0)
    net = FastFlowNet(backbone(), (64, 96), **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    state = public(net, **names)
    if "convs" in names:
        state = {key if key.startswith("model.") else f"model.{key}": value for key, value in state.items()}
        content = {"state_dict": {**state, "post_processor.image_threshold": torch.ones(1)}, "epoch": 3}
    else:
        content = {"model_state_dict": {**state, "feature_extractor.blocks.9.weight": torch.ones(1)}, "epoch": 3}
    torch.save(content, tmp_path / "public.pt")
    found = pretrained(str(tmp_path / "public.pt"), backbone(), (64, 96))
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        for (z, logdet), (expected, other) in zip(found(image), net(image)):
            torch.testing.assert_close(z, expected)
            torch.testing.assert_close(logdet, other)
    assert found.backbone.weights == "random"


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="expected a FastFlow checkpoint of gathierry/FastFlow or anomalib"):
        pretrained(str(tmp_path / "none.pt"), backbone())
    for content, message in (
        ({"a": 1}, "no state dict of tensors"),
        ({"roi.weight": torch.ones(1)}, r"found 'roi.weight', expected nf_flows"),
        ({"nf_flows.1.module_list.0.global_scale": torch.ones(1, 4, 1, 1)}, "no first step of a first flow"),
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(UserError, match=message):
            pretrained(str(tmp_path / "other.pt"), backbone())
    torch.save(public(FastFlowNet(backbone(), 64, flow_steps=1)), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"does not fit this FastFlowNet: norms.0.weight: found"):
        pretrained(str(tmp_path / "other.pt"), backbone(), 96)


def test_from_the_command_line(tmp_path, monkeypatch):
    """Validated on images with masks it has thresholds; the calibrated checkpoint then predicts."""
    monkeypatch.delenv("RUN_DIR", raising=False)
    torch.manual_seed(0)
    net = FastFlowNet(backbone(), 64, flow_steps=2)
    torch.save({"model_state_dict": public(net)}, tmp_path / "public.pt")
    tree = mvtec(tmp_path / "tree", size=(70, 66))
    words = ["experiment=fastflow_mvtec_resnet18", "net=fastflow_public", f"model.net.file={tmp_path / 'public.pt'}"]
    words += ["model.net.backbone.model=mobilenetv2_035", "model.net.backbone.layers=[2,3]"]
    words += [f"data.data_dir={tree}", "data.category=bolt", "image_size=64", "logger=csv", f"run_dir={tmp_path / 'v'}"]
    assert main(["validate", *words]) == 0
    monkeypatch.delenv("RUN_DIR", raising=False)
    model = model_from_checkpoint(tmp_path / "v" / "checkpoints" / "calibrated.ckpt")
    expected = net.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.net.state_dict().items())
    found = tmp_path / "v" / "checkpoints" / "calibrated.ckpt"
    assert main(["predict", f"ckpt_path={found}", f"images={tree / 'bolt' / 'test'}", f"run_dir={tmp_path / 'p'}"]) == 0
    assert (tmp_path / "p" / "predictions" / "scores.csv").is_file()
    assert converted(public(net)).keys() == expected.keys()
