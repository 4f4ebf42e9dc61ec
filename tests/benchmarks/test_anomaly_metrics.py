"""The comparison of pixel metrics with tiny maps, its rows in this process."""

import json
import multiprocessing.dummy

import numpy as np
import pytest
import torch

from penstock.benchmarks import anomaly_metrics


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(anomaly_metrics, "get_context", lambda kind: multiprocessing.dummy)
    threads = torch.get_num_threads()
    anomaly_metrics.main(["--images", "12", "--strong", "12", "--kept", "5", "--size", "64", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "anomaly_metrics.json").read_text())
    ours, sklearn, torchmetrics, many, strong = found["rows"]
    assert (sklearn["how"], torchmetrics["how"]) == ("scikit-learn", "torchmetrics")
    assert 0.6 < ours["pixel AP"] < 1
    for name in ("pixel AUROC", "pixel AP"):
        assert sklearn[name] == pytest.approx(ours[name], abs=1e-12)
        assert torchmetrics[name] == pytest.approx(ours[name], abs=1e-4)
    assert found["differences"]["pixel AP, scikit-learn"] < 1e-12
    assert many["pixels"] == 12 * 64 * 64
    assert strong["binades"] > many["binades"] - 5


def test_maps_are_like_those_of_the_method():
    found = list(anomaly_metrics.maps(10, 64, 0, alike=False))
    assert [bool(mask.any()) for _, mask in found] == [True] * 7 + [False] * 3
    scores, masks = (np.stack(column) for column in zip(*found))
    assert scores.min() >= -1
    assert scores.max() <= 0
    assert np.median(scores) == pytest.approx(-0.6, abs=0.05)
    assert scores[masks].mean() > scores[~masks].mean() + 0.1
