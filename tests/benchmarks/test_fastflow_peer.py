"""The benchmark against anomalib: its pieces, and all of it where anomalib is installed."""

import importlib.util
import json

import pytest
import torch

from penstock.benchmarks import fastflow_peer
from penstock.benchmarks.fastflow_peer import alike, cached, detectors, grown, main, row, trained, trainer
from penstock.benchmarks.fastflow_peer_models import PEER, Pair
from penstock.lightning_modules.fastflow import FastFlow
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import FastFlowNet


def ours() -> Pair:
    torch.manual_seed(0)
    net = FastFlowNet(Backbone("mobilenetv2_035", layers=[2, 3], weights="random"), 64, flow_steps=2)
    return Pair("small", FastFlow(net, torch.optim.Adam).eval(), None, (64, 64))


def test_absent_packages_are_one_line(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "anomalib" else find(name))
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("anomalib is missing")
    assert "pip install anomalib==2.7.0" in line


def test_training_and_kept_features():
    models = ours()
    before = {name: p.clone() for name, p in models.ours.named_parameters()}
    maps = models.ours.net.backbone(torch.rand(2, 3, 64, 64))
    losses = trained(trainer("penstock", models), lambda: iter([maps, maps, maps]))
    assert losses[2] < losses[1] < losses[0]
    changed = {name for name, p in models.ours.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {name for name in before if ".flows." in name or ".norms." in name}
    found = cached(ours, 2, 2, 1)
    assert found["largest difference"] == 0
    assert found["epochs/s, kept features"] > 0


def test_forms_give_the_same_maps(tmp_path):
    models = ours()
    forms = ("eager", "onnxruntime", "onnxruntime, alone", "ncnn")
    found = {form: detectors(models, form, 3, tmp_path, 1, ["penstock"])["penstock"]() for form in forms}
    for form in forms:
        assert found[form].shape == (3, 1, 64, 64)
        assert alike({"one": found["eager"], "other": found[form]}, 1e-4, "maps") < 1e-4
    assert grown(models, "eager", 4, "penstock", 1) > 0.1


def test_figures():
    found = row("work", 8, {"penstock": [1.0, 2.0, 4.0], PEER: [2.0, 4.0, 8.0]}, 0.5)
    assert found == {
        "work": "work",
        "penstock, images/s": 4,
        f"{PEER}, images/s": 2,
        "ours / anomalib's": 2,
        "largest difference": 0.5,
    }
    alone = row("work", 8, {"penstock": [2.0]}, 0.5)
    assert (alone["penstock, images/s"], alone[f"{PEER}, images/s"], alone["ours / anomalib's"]) == (4, None, None)
    with pytest.raises(RuntimeError, match=r"maps: a and b differ by 0\.5, expected at most 0\.1"):
        alike({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.0, 2.0])}, 0.1, "maps")
    with pytest.raises(RuntimeError, match="nan"):
        alike({"a": torch.tensor([float("nan")]), "b": torch.ones(1)}, 0.1, "maps")


def test_all_of_it(tmp_path, monkeypatch):
    pytest.importorskip("anomalib")
    monkeypatch.setattr(fastflow_peer, "FORMS", ("eager", "onnxruntime", "openvino, bf16", "ncnn"))
    words = ["--rounds", "1", "--steps", "1", "--batch", "2", "--side", "64", "--backbones", "resnet18"]
    assert main([*words, "--no-compile", "--no-memory", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "fastflow_peer_cpu.json").read_text())
    assert len(found["rows"]) == 13
    assert all(line["largest difference"] < 1e-4 for line in found["rows"] if "bf16" not in line["work"])
