import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from penstock.lightning_modules.callbacks import reference as reference_module
from penstock.lightning_modules.callbacks.features import Pixels, Points
from penstock.lightning_modules.callbacks.frechet import FrechetDistance
from penstock.lightning_modules.callbacks.generation import GenerationMetrics, balanced_labels, generate
from penstock.lightning_modules.errors import UserError


def score(fakes, folder, module, data, metric, steps=(1, 4), n=620):
    trainer = fakes.quiet_trainer(folder, [GenerationMetrics([metric], steps=list(steps), n=n)])
    return trainer.test(module, datamodule=data, verbose=False)[0]


def test_value_is_torch_fidelitys_on_the_same_pixels(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    found = score(fakes, tmp_path, module, data, FrechetDistance(Pixels(), split="all"))
    assert set(found) == {"fd_pixels/1", "fd_pixels/4"}
    fake = torch.cat([c.data for c in generate(module, 620, 4, 0, balanced_labels(620, 10))]).flatten(1)
    statistics = (fid_features_to_statistics(x.double()) for x in (fake, module.memory.flatten(1)))
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found["fd_pixels/4"] == pytest.approx(expected, rel=1e-5)
    assert found["fd_pixels/1"] > found["fd_pixels/4"]


def test_companions_are_logged_under_the_features_name(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    metric = FrechetDistance(Pixels(), also=["kid", "precision", "recall"])
    found = score(fakes, tmp_path, module, data, metric, steps=[8])
    assert set(found) == {"fd_pixels/8", "kid_pixels/8", "precision_pixels/8", "recall_pixels/8"}
    assert found["precision_pixels/8"] > 0.8
    assert abs(found["kid_pixels/8"]) < 0.05


def test_reference_is_read_from_disk_and_belongs_to_its_data(fakes, tmp_path, cache):
    module, data = fakes.digits_module_and_data()
    metric = {"metric": FrechetDistance(Pixels(), split="all"), "steps": [4]}
    first = score(fakes, tmp_path, module, data, **metric)
    assert data.asked == ["all"]
    again = score(fakes, tmp_path, module, data, FrechetDistance(Pixels(), split="all"), steps=[4])
    assert data.asked == ["all"]
    assert again == first
    score(fakes, tmp_path, module, data, FrechetDistance(Pixels(), split="train"), steps=[4])
    data.fingerprint = "other"
    score(fakes, tmp_path, module, data, FrechetDistance(Pixels(), split="all"), steps=[4])
    assert data.asked == ["all", "train", "all"]
    data.fingerprint, data.reference_fingerprint = "pairs of these", "other"
    score(fakes, tmp_path, module, data, FrechetDistance(Pixels(), split="all"), steps=[4])
    assert data.asked == ["all", "train", "all"]
    names = sorted(path.name for path in (cache / "reference").iterdir())
    assert len(names) == 3
    assert all(name.startswith("pixels-") and name.endswith(".safetensors") for name in names)


def test_a_damaged_cache_is_replaced_with_a_warning(fakes, tmp_path, cache):
    module, data = fakes.digits_module_and_data()
    first = score(fakes, tmp_path, module, data, FrechetDistance(Pixels()), steps=[4])
    (path,) = (cache / "reference").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read"):
        again = score(fakes, tmp_path, module, data, FrechetDistance(Pixels()), steps=[4])
    assert again == first
    assert path.read_bytes() == whole


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def dies(name):
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_module._replace(tmp_path / "a" / "b", dies)
    assert list((tmp_path / "a").iterdir()) == []


def test_kept_rows_do_not_depend_on_order_or_ranks(monkeypatch):
    monkeypatch.setattr(reference_module, "KEPT", 20)
    index, features = torch.arange(500), torch.randn(500, 3)
    one = reference_module._Kept()
    one.add(index, features, index % 7)
    kept, rows, labels = one.columns()
    assert len(kept) == 20
    assert kept.tolist() == sorted(kept.tolist())
    assert np.corrcoef(np.arange(20), kept)[0, 1] > 0.9
    assert torch.equal(rows, features[kept])
    other = reference_module._Kept()
    for part in torch.randperm(500).split(17):
        other.add(part, features[part], part % 7)
    for a, b in zip(other.columns(), (kept, rows, labels)):
        assert torch.equal(a, b)


def test_points_carry_their_own_name_and_pixels_refuse_them(fakes, tmp_path):
    points = torch.randn(90, 2)
    module = fakes.FakeModule(points, None)
    data = fakes.FakeData({"points": points}, 0, "points")
    assert list(score(fakes, tmp_path, module, data, FrechetDistance(Points()), steps=[2])) == ["fd_points/2"]
    with pytest.raises(UserError, match=r"shape \(2,\) are no images; use Points"):
        score(fakes, tmp_path, module, data, FrechetDistance(Pixels()), steps=[2])


def test_an_empty_split_is_named(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    with pytest.raises(UserError, match="split 'val' holds 0 samples"):
        score(fakes, tmp_path, module, data, FrechetDistance(Pixels(), split="val"), steps=[2])


def test_two_processes_give_the_values_of_one(tmp_path, monkeypatch, cache):
    here = Path(__file__).parent
    with ranks.running(here / "two_ranks.py", tmp_path, timeout=120):
        pass
    two, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "another"))
    monkeypatch.syspath_prepend(here)
    one = importlib.import_module("two_ranks").run(1, tmp_path / "one")
    assert (one["world"], two["world"], other["world"]) == (1, 2, 2)
    assert two["logged"] == other["logged"]
    assert two["logged"] == pytest.approx(one["logged"], abs=1e-6)
    assert two["logged"].keys() == one["logged"].keys()
    assert two["exact"]["fd_pixels"] == pytest.approx(one["exact"]["fd_pixels"], abs=1e-10)
    assert two["exact"]["kid_pixels"] == pytest.approx(one["exact"]["kid_pixels"], abs=1e-12)
    for name in ("precision_pixels", "recall_pixels", "label_accuracy"):
        assert two["exact"][name] == one["exact"][name]
    assert two["count"] == one["count"] == 1797
    assert one["picture"] == two["picture"]


def test_data_without_real_samples_are_refused_before_training(tmp_path):
    class Data:
        fingerprint = "latents"

        @property
        def reference_fingerprint(self):
            raise UserError("data.real: found none")

    with pytest.raises(UserError, match=r"data\.real: found none"):
        FrechetDistance(Pixels()).check(SimpleNamespace(datamodule=Data()), None)
