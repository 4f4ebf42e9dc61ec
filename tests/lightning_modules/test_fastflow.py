"""FastFlow end to end on tiny trees: training, kept features, resuming, tiles, export."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.fastflow import FastFlow
from penstock.lightning_modules.feature_cache import FeatureCache
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import FastFlowNet
from tests.anomaly_trees import mvtec, picture, save

TINY = [
    "experiment=fastflow_magnetic_tile",
    "data.category=bolt",
    "image_size=64",
    "data.batch_size=4",
    "model.net.backbone.model=mobilenetv2_035",
    "model.net.backbone.weights=random",
    "model.net.flow_steps=2",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "callbacks.checkpoint.every_n_epochs=1",
    "callbacks.gallery.rows=3",
    "logger=csv",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return mvtec(tmp_path_factory.mktemp("tree"), size=(70, 66))


def fit(folder, tree, *words):
    assert main(["fit", *TINY, f"data.data_dir={tree}", f"run_dir={folder}", *words]) == 0
    os.environ.pop("RUN_DIR")  # or the next run would go on in this folder
    return folder


@pytest.fixture(autouse=True)
def no_run_dir(monkeypatch):
    monkeypatch.delenv("RUN_DIR", raising=False)


@pytest.fixture(scope="module")
def run(tree, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUN_DIR", raising=False)
        return fit(tmp_path_factory.mktemp("run") / "a", tree)


def state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_metrics_pictures_thresholds_and_the_best(run):
    found = json.loads((run / "metrics.json").read_text())
    names = {"image_auroc", "pixel_auroc", "aupro", "image_ap", "image_f1_max", "pixel_threshold", "test/loss"}
    assert names | {"best_on_test/image_auroc", "best_on_test/epoch", "val/image_auroc", "val/loss"} <= found.keys()
    assert found["image_auroc"] == pytest.approx(found["val/image_auroc"])  # the same images, the same weights
    assert {path.name for path in (run / "samples").iterdir()} >= {"test.png", "step_000004.png"}
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert not state(run)["calibration.image_threshold"].isnan()


def test_kept_features_change_nothing(run, tree, tmp_path):
    plain = state(fit(tmp_path / "b", tree, "model.cache_features=false"))
    for key, value in state(run).items():
        torch.testing.assert_close(value, plain[key], rtol=0, atol=0, msg=key)


def test_a_resumed_run_has_the_same_bits(run, tree, tmp_path):
    folder = fit(tmp_path / "c", tree, "trainer.max_epochs=1")
    last = folder / "checkpoints" / "last.ckpt"
    assert main(["fit", f"ckpt_path={last}", "trainer.max_epochs=2", f"run_dir={folder}"]) == 0
    for key, value in state(run).items():
        torch.testing.assert_close(value, state(folder)[key], rtol=0, atol=0, msg=key)


def test_a_resumed_run_keeps_features_of_the_same_batches(tree, tmp_path, monkeypatch):
    """As convolutions round differently in batches of another size."""
    maps = FastFlowNet.maps
    monkeypatch.setattr(FastFlowNet, "maps", lambda net, image: [y * (1 + 1e-3 * len(image)) for y in maps(net, image)])
    words = ["model.net.norm=channel", "data.batch_size=3", "data.eval_batch_size=4", "callbacks.gallery=null"]
    whole = state(fit(tmp_path / "whole", tree, *words))
    folder = fit(tmp_path / "stopped", tree, *words, "trainer.max_epochs=1")
    last = folder / "checkpoints" / "last.ckpt"
    assert main(["fit", f"ckpt_path={last}", "trainer.max_epochs=2", f"run_dir={folder}"]) == 0
    for key, value in whole.items():
        torch.testing.assert_close(state(folder)[key], value, rtol=0, atol=0, msg=key)


def test_kept_features_and_augmentation_exclude_each_other(tree, tmp_path, capsys):
    words = [*TINY, f"data.data_dir={tree}", f"run_dir={tmp_path / 'd'}", "data.flip=true"]
    assert main(["fit", *words]) == 2
    assert "model.cache_features" in capsys.readouterr().err


def test_a_checkpoint_needs_no_weights_of_the_backbone(tree, tmp_path):
    weights = tmp_path / "w.pth"
    torch.manual_seed(1)
    torch.save(Backbone("mobilenetv2_035", weights="random")._create().state_dict(), weights)
    folder = fit(tmp_path / "e", tree, f"model.net.backbone.weights={weights}", "trainer.max_epochs=1")
    expected = torch.load(weights, weights_only=True)["conv_stem.weight"]
    weights.unlink()
    torch.testing.assert_close(state(folder)["net.backbone.net.conv_stem.weight"], expected, rtol=0, atol=0)
    assert main(["test", f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", f"run_dir={tmp_path / 'f'}"]) == 0


def test_predictions_of_the_test_images(run, tmp_path):
    assert main(["predict", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"run_dir={tmp_path / 'g'}"]) == 0
    found = json.loads((tmp_path / "g" / "predictions" / "scores.json").read_text())
    files = [row["file"] for row in found["images"]]
    assert len(files) == 10
    assert files[0] == "test/good/000.png"
    assert all((tmp_path / "g" / "predictions" / kind / file).is_file() for kind in ("heat", "masks") for file in files)
    rows = found["images"]
    assert [row["anomalous"] for row in rows] == [row["score"] >= found["image_threshold"] for row in rows]
    assert (tmp_path / "g" / "predictions" / "scores.csv").read_text().count("\n") == 11


def tiny(**options) -> FastFlow:
    torch.manual_seed(0)
    net = FastFlowNet(Backbone("mobilenetv2_035", weights="random"), 64, flow_steps=2, norm_affine=False)
    return FastFlow(net, torch.optim.Adam, **options).eval()


def test_larger_images_are_scored_in_tiles():
    model, image = tiny(tile=64), torch.rand(2, 3, 100, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        found = model.predict_step({"image": image, "index": torch.arange(2)}, 0)
        assert found["map"].shape == (2, 1, 100, 64)
        torch.testing.assert_close(found["score"], found["map"].flatten(1).amax(1))
        torch.testing.assert_close(found["map"][:, :, :30], model(image[:, :, :64])[1][:, :, :30])  # one tile sees it
        small = model.predict_step({"image": image[:, :, :64], "index": torch.arange(2)}, 0)
        torch.testing.assert_close(small["map"], model(image[:, :, :64])[1])


def test_a_cache_gives_what_was_put_in_by_number():
    cache, calls = FeatureCache(), []

    def net(image):
        calls.append(len(image))
        return [image * 2, image[:, :, ::2]]

    images = torch.randn(300, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    numbers = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:300]
    for rows in torch.arange(300).split(7):
        cache(numbers[rows], images[rows], net)
    seen = len(calls)
    for known in (False, True):
        rows = torch.tensor([5, 299, 0, 5])
        found = cache(numbers[rows], images[rows], net, known)
        assert all(torch.equal(a, b) for a, b in zip(found, net(images[rows])))
    assert len(calls) == seen + 2  # of the comparison alone
    assert cache.bytes >= 300 * (32 + 16) * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top": 2}, "model.top: found 2"), ({"blur": -1}, "model.blur"), ({"overlap": 1}, "model.overlap")],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_exported_models_give_the_same(run, tmp_path, kind):
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main(["export", f"ckpt_path={checkpoint}", f"format={kind}", f"out={tmp_path}"]) == 0
    model = model_from_checkpoint(checkpoint)
    image = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(2 * image - 1)
    if kind == "torch":
        found = torch.export.load(tmp_path / "model.pt2").module()(image)
    else:
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(x) for x in session.run(["score", "map"], {"image": image.numpy()})]
    assert expected[1].std() > 1e-3
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["input"] == ["batch", 3, 64, 64]
    assert facts["image_threshold"] == pytest.approx(float(model.calibration.image_threshold))


def test_exported_to_ncnn(run, tmp_path, capsys):
    words = ["export", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "format=ncnn", f"out={tmp_path / 'out'}"]
    assert main([*words, "batch=2"]) == 2
    assert "batch=2: ncnn takes one image at a time" in capsys.readouterr().err
    assert main(words) == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["model.ncnn.bin", "model.ncnn.json", "model.ncnn.param"]
    facts = json.loads((tmp_path / "out" / "model.ncnn.json").read_text())
    assert (facts["input"], facts["outputs"], facts["top"]) == ([1, 3, 64, 64], ["map"], 0.03)


def test_exported_models_of_tiles_say_so():
    module, example, _, facts = tiny(tile=(64, 32), overlap=0.5).exportable()
    assert (facts["tile"], facts["overlap"], facts["top"]) == ([64, 32], 0.5, 0.0)
    assert module(example)[1].shape == (1, 1, 64, 32)
    assert "tile" not in tiny().exportable()[3]


def test_models_without_an_export_say_so(tmp_path, capsys):
    assert main(["export", "ckpt_path=nowhere.ckpt"]) == 2
    assert main(["export", "ckpt_path=pyproject.toml", "format=onxx"]) == 2
    assert "did you mean 'onnx'?" in capsys.readouterr().err


def predicted(run, tmp_path, *words, name="last"):
    os.environ.pop("RUN_DIR", None)  # of the call before
    checkpoint = run / "checkpoints" / f"{name}.ckpt"
    return main(["predict", f"ckpt_path={checkpoint}", f"run_dir={tmp_path / 'p'}", *words])


@pytest.fixture(scope="module")
def tiles(run, tmp_path_factory):
    """The run's model, calibrated for tiles of 48 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUN_DIR", raising=False)
        folder = tmp_path_factory.mktemp("tiles") / "v"
        words = [f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"run_dir={folder}", "model.tile=48"]
        assert main(["validate", *words]) == 0
    return folder


def test_thresholds_of_other_scores_are_refused_and_set_anew(run, tiles, tmp_path, capsys):
    for words in (["model.top=0"], ["model.blur=1"], ["model.tile=48"]):
        assert predicted(run, tmp_path, *words) == 2
        assert "the checkpoint's thresholds were set with" in capsys.readouterr().err
    one, other = (
        model_from_checkpoint(f) for f in (run / "checkpoints/last.ckpt", tiles / "checkpoints/calibrated.ckpt")
    )
    assert other.tile == (48, 48)
    assert float(one.calibration.image_threshold) != float(other.calibration.image_threshold)
    assert all(torch.equal(a, b) for a, b in zip(one.net.state_dict().values(), other.net.state_dict().values()))
    found = json.loads((tiles / "metrics.json").read_text())
    assert found["val/image_f1_max"] > 0
    with pytest.warns(UserWarning, match=r"model.top: found 0, .* image_f1 and pixel_f1 are at these thresholds"):
        assert (
            main(["test", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", "model.top=0", f"run_dir={tmp_path / 't'}"])
            == 0
        )


def test_predictions_of_a_folder(run, tree, tmp_path):
    for name, seed, mode in (("b.png", 1, "RGB"), ("in/c.jpg", 2, "RGB"), ("a.png", 3, "L")):
        save(picture(seed, (90, 61), mode), tmp_path / "new" / name)
    (tmp_path / "new" / "notes.txt").write_text("not a picture")
    assert predicted(run, tmp_path, f"images={tmp_path / 'new'}", "data.batch_size=2") == 0
    out = tmp_path / "p" / "predictions"
    found = json.loads((out / "scores.json").read_text())["images"]
    assert [row["file"] for row in found] == ["a.png", "b.png", "in/c.jpg"]
    assert Image.open(out / "heat" / "in" / "c.jpg.png").size == Image.open(out / "masks" / "b.png").size == (90, 61)
    model = model_from_checkpoint(run / "checkpoints" / "last.ckpt")
    image = Image.open(tmp_path / "new" / "b.png").resize((64, 64), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        assert found[1]["score"] == pytest.approx(float(model(pixels)[0]), abs=1e-5)


def test_predictions_in_tiles_of_pictures_as_they_are(tiles, tmp_path):
    save(picture(1, (150, 80)), tmp_path / "new" / "wide.png")
    save(picture(2, (64, 64)), tmp_path / "new" / "square.png")
    assert predicted(tiles, tmp_path, f"images={tmp_path / 'new'}", name="calibrated") == 0
    assert Image.open(tmp_path / "p" / "predictions" / "heat" / "wide.png").size == (150, 80)


def test_folders_that_cannot_be_predicted_on(run, tiles, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "cut.png").write_bytes(b"\x89PNG\r\n")
    save(picture(2, (30, 30)), tmp_path / "small" / "small.png")
    for folder, words, message in (
        ("none", [], "none: no such folder"),
        ("empty", [], "empty: no pictures"),
        ("bad", [], "cut.png: cannot read the image"),
    ):
        assert predicted(run, tmp_path, f"images={tmp_path / folder}", *words) == 2
        assert message in capsys.readouterr().err
    assert predicted(tiles, tmp_path, f"images={tmp_path / 'small'}", name="calibrated") == 2
    assert "small.png: found 30x30 pixels, expected at least 48x48" in capsys.readouterr().err
    for name in ("a.png", "b.png"):
        save(picture(2, (64, 64)), tmp_path / "bad" / name)
    assert predicted(run, tmp_path, f"images={tmp_path / 'bad'}", "data.batch_size=1") == 2
    kept = json.loads((tmp_path / "p" / "predictions" / "scores.json").read_text())["images"]
    assert [row["file"] for row in kept] == ["a.png", "b.png"]
    capsys.readouterr()
    assert main(["test", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"images={tmp_path}"]) == 2
    assert "expected penstock predict ckpt_path=FILE images=FOLDER" in capsys.readouterr().err


def test_norms_of_channels_are_those_of_the_training_images(tree, tmp_path):
    words = ["model.net.norm=channel", "trainer.max_epochs=1", "data.batch_size=3"]
    folder = fit(tmp_path / "h", tree, *words)
    model = model_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    files = sorted((tree / "bolt" / "train" / "good").iterdir())
    images = [np.array(Image.open(f).resize((64, 64), Image.Resampling.BILINEAR)) for f in files]
    with torch.no_grad():
        maps = model.net.backbone(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1)
    for norm, y in zip(model.net.norms, maps):
        torch.testing.assert_close(norm.mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.std, y.std((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
        assert norm.count == y[:, 0].numel()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_give_the_metrics_of_one(tree, tmp_path, strategy):
    harness = runpy.run_path(str(Path(__file__).parents[1] / "reliability" / "harness.py"))
    words = ["fit", *TINY, f"data.data_dir={tree}", "model.net.norm=channel", "trainer.accelerator=cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness["penstock"](*words, run=one).code == 0
    job = {"words": [*words[1:], f"strategy={strategy}", "trainer.devices=2"], "run": str(two)}
    job["words"] += ["model.cache_features=false"] if strategy == "fsdp" else []
    harness["on_ranks"](2, [job], tmp_path / "ranks")
    found, expected = (json.loads((run / "metrics.json").read_text()) for run in (two, one))
    names = {key for key in expected if "auroc" in key or "aupro" in key or "threshold" in key or "loss" in key}
    assert len(names) > 10
    for name in names - {"train/loss"}:  # of one rank's share
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_images_need_not_be_square(tree, tmp_path):
    folder = fit(tmp_path / "i", tree, "shape=[3,64,96]", "trainer.max_epochs=1", "model.net.norm=sample")
    assert "pixel_auroc" in json.loads((folder / "metrics.json").read_text())
    assert predicted(folder, tmp_path, f"images={tree / 'bolt' / 'test'}", "data.batch_size=3") == 0
    original = Image.open(tree / "bolt" / "test" / "crack" / "000.png").size
    assert Image.open(tmp_path / "p" / "predictions" / "masks" / "crack" / "000.png").size == original != (96, 64)
