"""Detectors on pyramids: groups of learning rates, two steps of Mask R-CNN, and what it is scored by."""

import json

import pytest
import torch

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.mask_rcnn import MaskDetector
from penstock.lightning_modules.nets.piip.tiny import tiny_backbone
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone
from penstock.lightning_modules.piip_detection import PiipDetector

SMALL = ["data.scenes=16", "data.batch_size=8", "trainer.max_epochs=1", "trainer.limit_val_batches=1", "logger=csv"]
SMALL += ["trainer.check_val_every_n_epoch=1", "model.scheduler=null", "callbacks.cost=null"]


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.05)


def test_rates_fall_towards_the_first_layers():
    net = MaskDetector(tiny_backbone([64, 128], [64, 32], depth=2), 3, channels=16, hidden=16)
    module = PiipDetector(net, optimizer, layer_decay=0.5)
    groups = module.configure_optimizers().param_groups
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    branch = net.backbone.pyramid.branches[0]
    assert len(rate) == len(list(module.parameters()))
    assert rate[id(branch.patch_embed.weight)] == (0.125, 0.05)
    assert rate[id(branch.blocks[0].attn.qkv.weight)] == (0.25, 0.05)
    assert rate[id(branch.blocks[1].attn.qkv.bias)] == (0.5, 0.0)
    assert rate[id(net.backbone.merge.weights[0])] == (1.0, 0.05)
    assert rate[id(net.backbone.merge.projections[0][0].weight)] == (1.0, 0.05)
    assert rate[id(net.net.roi_heads.box_predictor.cls_score.weight)] == (1.0, 0.05)


def test_other_backbones():
    backbone = TrainedBackbone("resnet18", layers=[1, 2, 3, 4], frozen=0, weights="random")
    net = MaskDetector(backbone, 3, channels=16, hidden=16)
    with pytest.raises(UserError, match=r"model\.net\.backbone: found TrainedBackbone, expected a pyramid"):
        PiipDetector(net, optimizer)


def test_masks_are_scored_from_words(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "fit"))
    assert main(["fit", "experiment=piip_digit_objects", *SMALL]) == 0
    values = json.loads((tmp_path / "fit" / "metrics.json").read_text())
    assert {"ap", "mask_ap", "mask_ap50", "val/mask_ap"} <= values.keys()
