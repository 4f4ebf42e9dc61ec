"""Metrics of an anomaly model in fit, validate and test: values, thresholds, best epoch, what is undefined, ranks."""

import importlib
import json
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from ranks import running
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from penstock.lightning_modules.callbacks.anomaly_metrics import AnomalyMetrics
from penstock.lightning_modules.callbacks.checkpoint import Checkpoint
from penstock.lightning_modules.callbacks.score_counts import ScoreCounts
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.errors import UserError

IMAGE = ("image_auroc", "image_ap", "image_f1_max", "image_f1_max_threshold")
PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_f1_max_threshold", "aupro")


@pytest.fixture
def made(fakes, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(importlib.sys.modules, "fakes", fakes)
    return importlib.import_module("anomaly_model")


def scored(data, noise):
    """Scores, labels, maps and masks of a model with this noise."""
    columns = data.columns
    noises = torch.stack(
        [torch.randn(12, 16, generator=torch.Generator().manual_seed(i)) for i in columns["index"].tolist()]
    )
    maps = columns["image"] + noise * noises[:, None]
    masks = columns["mask"].bool().numpy()
    return maps.amax((1, 2, 3)).numpy(), columns["label"].numpy(), maps.numpy(), masks


def f1_of(truth, scores):
    precision, recall, thresholds = precision_recall_curve(truth, scores)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-30))[:-1]
    return f1.max(), thresholds[f1 >= f1.max() - 1e-12].max()


def expected(data, noise):
    """Every metric by scikit-learn, but AUPRO."""
    scores, labels, maps, masks = scored(data, noise)
    values = {}
    for what, truth, flat in (("image", labels, scores), ("pixel", masks.ravel(), maps.ravel())):
        values[f"{what}_auroc"], values[f"{what}_ap"] = roc_auc_score(truth, flat), average_precision_score(truth, flat)
        values[f"{what}_f1_max"], values[f"{what}_f1_max_threshold"] = f1_of(truth, flat)
    counts = ScoreCounts()
    for image, mask in zip(maps[:, 0], masks[:, 0]):
        counts.update_map(image, mask)
    return values | {"aupro": counts.measure(0.3).aupro}


def saving_trainer(folder, callbacks, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **quiet, **settings)


def logged(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_values_of_the_last_and_the_best_epoch(fakes, made, tmp_path):
    module, data, callback = made.Detector(), made.Defects(), AnomalyMetrics()
    trainer = fakes.quiet_trainer(tmp_path, [callback], max_epochs=3)
    trainer.fit(module, datamodule=data)
    found = logged(trainer)
    for prefix, noise in (("val", 3.0), ("best_on_val", 0.5)):
        for name, value in expected(data, noise).items():
            assert found.pop(f"{prefix}/{name}") == pytest.approx(value, rel=1e-5), f"{prefix}/{name}"
    assert found == {"best_on_val/epoch": 1}
    scores, labels, maps, masks = scored(data, 3.0)
    values, calibration = expected(data, 3.0), module.calibration
    assert float(calibration.image_threshold) == values["image_f1_max_threshold"]
    assert float(calibration.pixel_threshold) == values["pixel_f1_max_threshold"]
    assert calibration.score_range.tolist() == [scores.min(), scores.max()]
    assert calibration.map_range.tolist() == [maps.min(), maps.max()]

    module.noise = (1.0,)
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    scores, labels, maps, masks = scored(data, 1.0)
    more = {
        "image_threshold": values["image_f1_max_threshold"],  # of the validation, by which predict decides
        "pixel_threshold": values["pixel_f1_max_threshold"],
        "image_f1": f1_score(labels, scores >= values["image_f1_max_threshold"]),
        "pixel_f1": f1_score(masks.ravel(), maps.ravel() >= values["pixel_f1_max_threshold"]),
    }
    assert found == pytest.approx(expected(data, 1.0) | more, rel=1e-5)
    assert abs(found["image_threshold"] - found["image_f1_max_threshold"]) > 0.1
    assert abs(found["pixel_threshold"] - found["pixel_f1_max_threshold"]) > 0.1
    assert float(calibration.image_threshold) == values["image_f1_max_threshold"], "a test sets no thresholds"
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    assert set(found) == {f"val/{name}" for name in (*IMAGE, *PIXEL)}
    assert float(calibration.image_threshold) == expected(data, 1.0)["image_f1_max_threshold"]


def test_best_checkpoint_is_of_the_best_epoch(fakes, made, tmp_path):
    data = made.Defects(val_is_test=True)
    trainer = saving_trainer(tmp_path, [Checkpoint(), AnomalyMetrics(monitor="aupro")], max_epochs=3)
    trainer.fit(made.Detector(), datamodule=data)
    found = logged(trainer)
    assert {name for name in found if name.startswith("best")} == {
        f"best_on_test/{name}" for name in (*IMAGE, *PIXEL, "epoch")
    }
    for file, noise, epoch in (("best.ckpt", 0.5, 1), ("last.ckpt", 3.0, 2)):
        kept = load_checkpoint(tmp_path / "checkpoints" / file)
        values = expected(data, noise)
        assert kept["epoch"] == epoch
        assert float(kept["state_dict"]["calibration.image_threshold"]) == values["image_f1_max_threshold"]
        assert float(kept["state_dict"]["calibration.pixel_threshold"]) == values["pixel_f1_max_threshold"]


def test_a_resumed_run_keeps_its_best_epoch(fakes, made, tmp_path):
    for epochs in (2, 4):
        module, callback = made.Detector(), AnomalyMetrics(save_best=False)
        trainer = saving_trainer(tmp_path, [callback, Checkpoint()], max_epochs=epochs, num_sanity_val_steps=0)
        path = tmp_path / "checkpoints" / "last.ckpt"
        trainer.fit(module, datamodule=made.Defects(), ckpt_path=path if epochs == 4 else None)
        assert logged(trainer)["best_on_val/epoch"] == 1
    assert logged(trainer)["best_on_val/image_auroc"] > logged(trainer)["val/image_auroc"]
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()
    trainer = fakes.quiet_trainer(tmp_path, [callback], max_epochs=1)
    trainer.fit(made.Detector(), datamodule=made.Defects())
    assert logged(trainer)["best_on_val/epoch"] == 0, "another fit has its own best"


def test_sanity_check_does_not_count(fakes, made, tmp_path):
    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            assert callback.best.values == {}
            assert pl_module.calibration.image_threshold.isnan()
            assert not (tmp_path / "checkpoints").exists()

    callback = AnomalyMetrics()
    trainer = fakes.quiet_trainer(tmp_path, [callback, Look()], num_sanity_val_steps=-1)
    trainer.fit(made.Detector(), datamodule=made.Defects())
    assert callback.best.values["epoch"] == 0
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("pixels", [True, False])
def test_only_images_without_masks(fakes, made, tmp_path, pixels):
    module, data = made.Detector((1.0,)), made.Defects(masks=not pixels)
    trainer = fakes.quiet_trainer(tmp_path, [AnomalyMetrics(pixels=pixels)])
    trainer.fit(module, datamodule=data)
    assert set(logged(trainer)) == {f"{p}/{n}" for p in ("val", "best_on_val") for n in IMAGE} | {"best_on_val/epoch"}
    values = expected(made.Defects(), 1.0)
    assert float(module.calibration.image_threshold) == values["image_f1_max_threshold"]
    assert module.calibration.pixel_threshold.isnan()
    maps = scored(made.Defects(), 1.0)[2]
    assert module.calibration.map_range.tolist() == [maps.min(), maps.max()]
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    assert set(found) == {*IMAGE, "image_f1", "image_threshold"}


def test_all_normal_is_undefined(fakes, made, tmp_path):
    module, data = made.Detector((1.0,)), made.Defects(anomalous=False)
    trainer = fakes.quiet_trainer(tmp_path, [AnomalyMetrics()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data)
    text = "\n".join(str(warning.message) for warning in caught)
    for what, names in (("image", "image_ap and image_f1_max"), ("pixel", "pixel_ap and pixel_f1_max, and aupro,")):
        expected = f"all {what}s of the validation split are normal; {what}_auroc, {names} are undefined and not logged"
        assert expected in text
    assert logged(trainer) == {}
    scores, _, maps, _ = scored(data, 1.0)
    assert float(module.calibration.image_threshold) == scores.max()
    assert float(module.calibration.pixel_threshold) == maps.max()
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize(("every", "said"), [(2, 1), (1, 0)])
def test_a_fit_without_a_validation_says_so_once_at_its_end(fakes, made, tmp_path, every, said):
    module, data = made.Detector(), made.Defects()
    trainer = fakes.quiet_trainer(tmp_path, [AnomalyMetrics()], check_val_every_n_epoch=every, num_sanity_val_steps=-1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data)
    text = [str(warning.message) for warning in caught if "without a validation" in str(warning.message)]
    assert len(text) == said
    assert all(
        line.endswith("trainer.check_val_every_n_epoch=1, or calibrate it: penstock validate ckpt_path=FILE")
        for line in text
    )
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    assert ("image_threshold" in found) == ("image_f1" in found) == (not said), "no thresholds, none logged"


def test_all_anomalous_is_undefined_for_images(fakes, made, tmp_path):
    module, data = made.Detector((1.0,)), made.Defects(normal=False)
    with pytest.warns(UserWarning, match="all images of the test split are anomalous"):
        found = fakes.quiet_trainer(tmp_path, [AnomalyMetrics()]).test(module, datamodule=data, verbose=False)[0]
    assert set(found) == set(PIXEL)


def test_two_ranks_are_one(fakes, made, tmp_path):
    with running(Path(made.__file__), tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = made.run(1, tmp_path / "one")
    for rank in range(2):
        two = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (one["world"], two["world"]) == (1, 2)
        for part in ("fit", "test"):
            aupro = {name for name in one[part] if name.endswith("aupro")}
            assert {k: two[part][k] for k in aupro} == pytest.approx({k: one[part][k] for k in aupro}, rel=1e-6)
            assert {k: v for k, v in two[part].items() if k not in aupro} == {
                k: v for k, v in one[part].items() if k not in aupro
            }
        assert two["calibration"] == one["calibration"]
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def test_refusals(fakes, made, tmp_path):
    def fit(callback, module=None, data=None):
        fakes.quiet_trainer(tmp_path, [callback]).fit(module or made.Detector(), datamodule=data or made.Defects())

    with pytest.raises(UserError, match="fpr_limit: 0 given"):
        AnomalyMetrics(fpr_limit=0)
    with pytest.raises(UserError, match="monitor: aupro is not measured with pixels=false"):
        AnomalyMetrics("aupro", pixels=False)
    with pytest.raises(UserError, match="monitor: pixel_ap needs masks, and the batches hold none"):
        fit(AnomalyMetrics("pixel_ap"), data=made.Defects(masks=False))
    with pytest.raises(UserError, match="AnomalyMetrics: FakeModule has no calibration, expected an anomaly model"):
        fit(AnomalyMetrics(), *fakes.digits_module_and_data())
    for bad in (math.nan, math.inf):
        data = made.Defects()
        data.columns["image"][17, 0, 3, 3] = bad
        data.columns["image"][21, 0, 3, 3] = bad
        with pytest.raises(UserError, match="score: NaN or infinite for image 17 of the validation split, and for 1"):
            fit(AnomalyMetrics(), data=data)
    data = made.Defects()
    data.columns["mask"] = data.columns["mask"][..., :8]
    with pytest.raises(UserError, match=r"map: shape \(7, 1, 12, 16\), expected that of the mask, \(7, 1, 12, 8\)"):
        fit(AnomalyMetrics(), data=data)
    module = made.Detector()
    module.validation_step = lambda batch, batch_idx: {"loss": 1}
    with pytest.raises(UserError, match=r"outputs of a step: \['loss'\] found, expected index, score and map"):
        fit(AnomalyMetrics(), module)
