"""PIIP as a classifier: fit, test, predict, resume from words; groups of learning rates; refusals."""

import csv
import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from penstock.datamodules.lone_digits import LoneDigits
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.layer_decay import apply_scales, scaled_groups
from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.vit import VitBranch
from penstock.lightning_modules.piip import Piip

TINY = [
    "experiment=piip_digits",
    "data.pictures=64",
    "data.batch_size=16",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "callbacks.cost.runs=1",
]


@pytest.fixture(autouse=True)
def no_run_dir(monkeypatch):
    monkeypatch.delenv("RUN_DIR", raising=False)


def branch(size: int, dim: int, **kwargs) -> VitBranch:
    own = {"groups": 2, "depth": 2, "num_heads": 2, "num_classes": 3, "class_token": True, "in_chans": 1, **kwargs}
    return VitBranch("deit_tiny_patch16_224", size, weights="random", embed_dim=dim, resize_table=True, **own)


def module(**kwargs) -> Piip:
    torch.manual_seed(0)
    net = PiipClassifier([branch(32, 64), branch(64, 32)], 3)
    return Piip(net, lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1), **kwargs)


def test_from_words(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert main(["fit", *TINY, "model.mixup=0.8", "model.cutmix=1.0", "model.smoothing=0.1", f"run_dir={run}"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["accuracy"] <= metrics["accuracy_top5"] <= 1
    assert metrics["val/loss"] > 0
    assert {"gflops", "latency_ms", "train/loss"} <= set(metrics)
    file = run / "checkpoints" / "last.ckpt"
    data = LoneDigits(pictures=64)
    data.setup()
    model, test = model_from_checkpoint(file).eval(), data.view("test")
    batch = data.finished(test.fetch(torch.arange(16).numpy()))
    with torch.no_grad():
        logits = model(batch["image"])
    assert metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == batch["label"]).float().mean()), abs=1e-6)
    assert metrics["test/loss"] == pytest.approx(float(F.cross_entropy(logits, batch["label"])), abs=1e-5)

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, image in enumerate(data.store.tensors["image"][test.numbers[:2]]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(pictures / f"{number}.png")
    monkeypatch.delenv("RUN_DIR")
    assert main(["predict", f"ckpt_path={file}", f"images={pictures}", f"run_dir={tmp_path / 'p'}"]) == 0
    rows = list(csv.DictReader((tmp_path / "p" / "predictions" / "classes.csv").open()))
    assert [row["class_1"] for row in rows] == [str(k) for k in logits[:2].argmax(1).tolist()]
    assert [row["file"] for row in rows] == ["0.png", "1.png"]
    best = logits[:2].softmax(1).topk(3).values
    for k in range(3):
        assert [float(row[f"probability_{k + 1}"]) for row in rows] == pytest.approx(best[:, k].tolist(), abs=2e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["image_size=96"], "image_size: found images of 96x96 pixels, expected 64x64"),
        (["model.net.num_classes=7"], "num_classes: found 7, expected 10, the data's classes"),
        (["model.smoothing=1"], "model.smoothing: found 1.0, expected at least 0 and below 1"),
        (["model.net.head=merge"], "merged"),
    ],
)
def test_refused(words, said, tmp_path, capsys):
    assert main(["fit", *TINY, *words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err


def test_images_are_normalised():
    model = module(mean=(0.25,), std=(0.5,)).double().eval()
    image = torch.rand(2, 1, 64, 64, dtype=torch.float64) * 2 - 1
    assert (model(image) - model.net(((image + 1) / 2 - 0.25) / 0.5)).abs().max() < 1e-12


def test_layer_decay():
    model = module(layer_decay=0.5, outside_lr=3.0)
    optimizer = model.configure_optimizers()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}
    assert len(names) == len(rates)
    unseen = {name for name, _ in model.named_parameters()} - names.keys()
    assert unseen == {name for name, _ in model.named_parameters() if name.startswith("net.pyramid.interactions.1.")}
    for k in range(2):
        branch = f"net.pyramid.branches.{k}."
        found = [names[branch + name] for name in ("patch_embed.weight", "pos_embed", "cls_token")]
        assert found == [0.125] * 3
        assert [names[f"{branch}blocks.{j}.attn.qkv.weight"] for j in range(2)] == [0.25, 0.5]
        assert [names[branch + name] for name in ("norm.weight", "head.weight")] == [1.0, 1.0]
    assert {rate for name, rate in names.items() if ".interactions." in name} == {3.0}


def test_layers_of_a_shallow_branch_count_more():
    net = nn.ModuleDict({"deep": nn.ModuleDict(), "flat": nn.ModuleDict(), "rest": nn.Linear(1, 1)})
    net["deep"]["blocks"] = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
    net["flat"]["blocks"] = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
    groups = scaled_groups(net.named_parameters(), [("deep.", 4), ("flat.", 2)], 0.5, decay_vectors=False)
    optimizer = apply_scales(torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in net.named_parameters()}
    assert [found[f"deep.blocks.{j}.weight"] for j in range(4)] == [(0.5 ** (4 - j), 0.1) for j in range(4)]
    assert [found[f"flat.blocks.{j}.weight"] for j in range(2)] == [(0.5**3, 0.1), (0.5, 0.1)]
    assert found["rest.weight"] == (1.0, 0.1)
    assert all(decay == (0.0 if name.endswith("bias") else 0.1) for name, (_, decay) in found.items())


def test_a_branch_without_layers_to_count_trains_as_it_is():
    named = [("a.blocks.0.weight", torch.zeros(2, 2)), ("b.stages.0.blocks.0.weight", torch.zeros(2, 2))]
    groups = scaled_groups(named, [("a.", 4), ("b.", 0)], 0.5)
    assert [group["lr_scale"] for group in groups] == [0.5**4, 1.0]


def test_flops(capsys):
    assert main(["flops", "experiment=piip_digits", "net=piip_tsb_368", "num_classes=1000"]) == 0
    rows = {line[:39].strip(): line[39:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["all"] == ["17.427", "144.031"]
    assert rows["branch 2, 192 channels on 368 pixels"] == ["4.186", "5.786"]
    assert rows["published"] == ["17.4"]
    assert rows["closed form of it, norms left out"][-1] == "17.282"
    assert main(["flops", "experiment=rectified_flow_digits"]) == 2
    assert "RectifiedFlow has no costs by parts" in capsys.readouterr().err


def test_values_out_of_range():
    with pytest.raises(UserError, match=r"model\.mixup: found -1, expected at least 0"):
        module(mixup=-1)
