"""UperNet on a pyramid: fit, test, predict, resume from words; windows; groups of learning rates; refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from penstock.datamodules.digit_masks import DigitMasks
from penstock.datamodules.segmentation import Segmentation
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.callbacks.segmentation_pictures import palette
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.class_masks import pixel_loss
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.vit import VitBranch
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone
from penstock.lightning_modules.nets.upernet import SegmentationNet
from penstock.lightning_modules.upernet import UperNet
from tests.mask_trees import mask_tree

TINY = ["experiment=piip_digit_masks", "data.scenes=32", "image_size=64", "model.net.channels=8"]
TINY += ["trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "trainer.log_every_n_steps=1"]
TINY += ["logger=csv", "callbacks.cost.runs=1", "trainer.enable_model_summary=false"]


@pytest.fixture
def penstock(monkeypatch):
    """The command line, each time as from a new shell."""

    def run(*words: str) -> int:
        monkeypatch.delenv("RUN_DIR", raising=False)
        return main(list(words))

    return run


def pyramid(**kwargs) -> PiipBackbone:
    own = {"groups": 2, "depth": 2, "num_heads": 2, "weights": "random", "resize_table": True, **kwargs}
    branches = [VitBranch("deit_tiny_patch16_224", size, embed_dim=dim, **own) for size, dim in ((32, 64), (64, 32))]
    return PiipBackbone(branches)


def module(backbone=None, **kwargs) -> UperNet:
    torch.manual_seed(0)
    net = SegmentationNet(backbone or pyramid(), 4, channels=8, auxiliary_channels=8)
    return UperNet(net, lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.1), **kwargs)


def test_from_words(penstock, tmp_path):
    run = tmp_path / "run"
    assert penstock("fit", *TINY, f"run_dir={run}") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    file = run / "checkpoints" / "last.ckpt"
    data = DigitMasks(scenes=32, image_size=64)
    data.setup()
    model, test = model_from_checkpoint(file).eval(), data.view("test")
    batch = data.finished(test.fetch(np.arange(8)))
    with torch.no_grad():
        scores = model(batch["image"])
    found, truth = scores.argmax(1).numpy(), batch["mask"].numpy()
    present = np.union1d(found, truth)
    iou = jaccard_score(truth.ravel(), found.ravel(), labels=present, average=None, zero_division=0)
    assert metrics["miou"] == pytest.approx(iou.mean(), abs=1e-6)
    assert {f"iou_of/{data.class_names[k]}" for k in present} == {name for name in metrics if name.startswith("iou_of")}
    assert metrics["pixel_accuracy"] == pytest.approx((found == truth).mean(), abs=1e-6)
    loss = torch.stack([pixel_loss(a[None], b[None]) for a, b in zip(scores, batch["mask"])]).mean()
    assert metrics["test/loss"] == pytest.approx(float(loss), abs=1e-5)
    assert {"best_on_val/miou", "gflops", "val/miou", "train/auxiliary_loss"} <= set(metrics)
    sheet = Image.open(run / "samples" / "test.png")
    assert sheet.size == (6 * 258 + 2, 4 * 258 + 2)

    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    sizes = {"a.png": (64, 64), "sub/b.png": (90, 40)}
    Image.fromarray(data.store.source.pictures[test.numbers[0]]).save(folder / "a.png")
    Image.fromarray(data.store.source.pictures[0]).resize(sizes["sub/b.png"]).save(folder / "sub" / "b.png")
    assert penstock("predict", f"ckpt_path={file}", f"images={folder}", f"run_dir={tmp_path / 'p'}") == 0
    masks = {name: Image.open(tmp_path / "p" / "predictions" / "masks" / name) for name in sizes}
    assert {name: mask.size for name, mask in masks.items()} == sizes
    assert np.array_equal(np.asarray(masks["a.png"]), found[0])
    assert np.array_equal(np.asarray(masks["a.png"].convert("RGB")), palette()[found[0]])
    rows = json.loads((tmp_path / "p" / "predictions" / "classes.json").read_text())
    assert rows[3] == {"value": 3, "name": "2", "colour": [128, 128, 0]}
    assert len(rows) == 11
    words = [f"ckpt_path={file}", "model.window=32", "model.stride=16", f"run_dir={tmp_path / 't'}"]
    assert penstock("test", *words) == 0
    slid = json.loads((tmp_path / "t" / "metrics.json").read_text())
    assert slid["test/loss"] != pytest.approx(metrics["test/loss"], abs=1e-6)


def test_resumed_in_an_epoch_is_the_same(penstock, tmp_path):
    words = [*TINY, "trainer.limit_val_batches=0", "trainer.limit_test_batches=1", "callbacks.cost=null"]
    words += ["callbacks.gallery=null", "trainer.max_epochs=-1", "model.net.backbone.drop_path=0.4"]
    files = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("whole", "parts")]
    assert penstock("fit", *words, "trainer.max_steps=6", f"run_dir={tmp_path / 'whole'}") == 0
    assert penstock("fit", *words, "trainer.max_steps=3", f"run_dir={tmp_path / 'parts'}") == 0
    assert penstock("fit", f"ckpt_path={files[1]}", "trainer.max_steps=6") == 0
    one, other = (load_checkpoint(file) for file in files)
    assert one["global_step"] == other["global_step"] == 6
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_images_of_several_sizes_are_scored_one_by_one(tmp_path):
    data = Segmentation(
        list("abcd"), data_dir=str(mask_tree(tmp_path)), reduce_zero_label=True, min_size=32, crop_size=32
    )
    data.setup()
    model = module().double().eval()
    batch = data.finished(data.view("val").fetch(np.arange(3)))
    batch["image"] = batch["image"].double()
    with torch.no_grad():
        together = model.predict_step(batch, 0)["mask"]
        for k in range(3):
            one = data.finished(data.view("val").fetch(np.array([k])))
            alone = model.predict_step({**one, "image": one["image"].double()}, 0)["mask"][0]
            height, width = alone.shape
            assert [height, width] == one["original_size"][0].tolist()
            assert torch.equal(together[k, :height, :width], alone)
            assert (together[k, height:] == 255).all()
            assert (together[k, :, width:] == 255).all()


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_a_window_that_covers_the_image_is_the_whole(size):
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    whole, window, small = (
        module(**own).double().eval() for own in ({}, {"window": 70, "stride": 20}, {"window": 32, "stride": 20})
    )
    with torch.no_grad():
        assert whole.scores(image).shape == (2, 4, *size)
        assert torch.equal(whole.scores(image), window.scores(image))
        assert (whole.scores(image) - small.scores(image)).abs().max() > 1e-3


def test_ranks_with_shards_make_as_many_calls(monkeypatch):
    """Another rank, of larger images, makes seven."""
    model, calls = module(window=32, stride=16).eval(), []
    model._sharded = True
    model.net.register_forward_hook(lambda _, given, __: calls.append(len(given[0])))
    monkeypatch.setattr("penstock.lightning_modules.upernet.largest", lambda own: calls.append(own) or 7)
    sizes = torch.tensor([[64, 64], [64, 48]])
    batch = {"index": torch.arange(2), "image": torch.rand(2, 3, 64, 64), "size": sizes, "original_size": sizes}
    with torch.no_grad():
        model.predict_step(batch, 0)
    assert calls == [3, 8, 1, 6, 1, 1, 1, 1]


def test_layer_decay():
    model = module(layer_decay=0.5)
    optimizer = model.configure_optimizers()
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert len(found) == len(rates)
    for k in range(2):
        branch = f"net.backbone.pyramid.branches.{k}."
        assert [found[f"{branch}blocks.{j}.attn.qkv.weight"] for j in range(2)] == [(0.25, 0.1), (0.5, 0.1)]
        assert found[f"{branch}patch_embed.weight"] == (0.125, 0.1)
        assert found[f"{branch}blocks.1.norm1.weight"] == (0.5, 0.0)
    assert found["net.head.classify.weight"] == (1.0, 0.1)
    assert found["net.head.classify.bias"] == (1.0, 0.0)
    assert found["net.head.fuse.1.weight"] == (1.0, 0.0)


def test_another_backbone_has_one_learning_rate():
    resnet = TrainedBackbone("resnet18", [1, 2, 3, 4], -1, False, "random")
    optimizer = module(resnet).configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [1.0]
    with pytest.raises(
        UserError, match=r"model\.layer_decay: found 0\.9, expected 1 of maps .* of resnet18, no pyramid"
    ):
        module(resnet, layer_decay=0.9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.net.num_classes=7"], "num_classes: found 7, expected 11, the data's classes"),
        (["data.batch_size=1"], "data.batch_size: found 1, expected at least 2: batch norms need more than one image"),
    ],
)
def test_refused(penstock, words, said, tmp_path, capsys):
    assert penstock("fit", *TINY, *words, f"run_dir={tmp_path / 'run'}") == 2
    assert said in capsys.readouterr().err


def test_values_out_of_range():
    with pytest.raises(UserError, match=r"model\.window: found 16, expected at least 32"):
        module(window=16)
    with pytest.raises(UserError, match=r"model\.stride: found 40, expected 1 to model\.window, 32"):
        module(window=32, stride=40)
    with pytest.raises(UserError, match=r"model\.layer_decay: found 0\.0, expected above 0 and at most 1"):
        module(layer_decay=0.0)


def test_flops(capsys):
    """The head by its formula: convolutions, two for each element of a norm, one for each ReLU, biases of scores."""
    assert main(["flops", "experiment=piip_ade20k"]) == 0
    rows = {line[:39].strip(): line[39:].split() for line in capsys.readouterr().out.splitlines()}
    width, channels, classes, cells = 3200, 1536, 150, [128**2, 64**2, 32**2, 16**2]
    pooled, fine = 1 + 4 + 9 + 36, sum(cells[:3])
    head = fine * (width + 9 * channels) * channels + pooled * width * channels
    head += cells[3] * 9 * (width + 4 * channels) * channels + cells[0] * (9 * 4 * channels * channels)
    head += cells[0] * classes * (channels + 1) + 3 * channels * (2 * fine + pooled + cells[3] + cells[0])
    assert rows["head"][0] == f"{head / 1e9:.3f}"
    assert rows["auxiliary"] == ["0.000", f"{(9 * width * channels + channels * (classes + 2) + classes) / 1e6:.3f}"]
    assert float(rows["backbone, counted as published"][0]) == pytest.approx(1663, rel=1e-3)
    assert rows["published"] == ["1663"]
    assert main(["flops", "experiment=piip_ade20k", "backbone=resnet50_maps", "model.layer_decay=1"]) == 2
    assert "flops: counts pyramids by their parts, found maps [1, 2, 3, 4] of resnet50" in capsys.readouterr().err


def test_data_of_other_classes_are_refused():
    model = module()
    model.classes, model._told_by_data = ["a", "b"], True
    with pytest.raises(UserError, match=r"data\.classes: found 'b' as class 1, expected 'c', as in the weights"):
        model.on_load_checkpoint({"trained_on": {"classes": ["a", "c"], "sides": None}})
