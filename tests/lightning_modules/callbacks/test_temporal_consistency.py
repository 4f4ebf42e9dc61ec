"""Neighbouring frames compared: by hand, beside real clips; frozen and flickering clips stand out."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from penstock.lightning_modules.callbacks.features import Pixels
from penstock.lightning_modules.callbacks.generation import GenerationMetrics, generate
from penstock.lightning_modules.callbacks.temporal_consistency import TemporalConsistency
from penstock.lightning_modules.errors import UserError


class Halves(Pixels):
    name = "halves"

    def __call__(self, data):
        return data.flatten(1)[:, :8]

    def identity(self):
        return {"name": self.name}


def clips(n=40):
    return torch.randn(n, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def by_hand(x, width):
    rows = x.flatten(2).double().numpy()
    change = np.mean([np.abs(clip[t + 1] - clip[t]).mean() for clip in rows for t in range(4)])
    cosines = [
        a[:width] @ b[:width] / np.linalg.norm(a[:width]) / np.linalg.norm(b[:width])
        for clip in rows
        for a, b in pairwise(clip)
    ]
    return np.mean(cosines), change


def score(fakes, folder, memory, metrics, n=30):
    module = fakes.FakeModule(memory, None)
    data = fakes.FakeData({"video": clips()}, 0, "noise", batch_size=7)
    trainer = fakes.quiet_trainer(folder, [GenerationMetrics(metrics, steps=[2], n=n, chunk=13)])
    return trainer.test(module, datamodule=data, verbose=False)[0], module


def test_numbers_by_hand_for_samples_and_real_clips(fakes, tmp_path):
    found, module = score(fakes, tmp_path, clips(), [TemporalConsistency(Halves())])
    fake = torch.cat([chunk.data for chunk in generate(module, 30, 2, 0, size=13)])
    names = ("frame_similarity_halves", "frame_change")
    expected = dict(zip((f"{name}/2" for name in names), by_hand(fake, 8)))
    expected |= dict(zip((f"{name}/real" for name in names), by_hand(clips()[1::2], 8)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_frozen_clips_do_not_change(fakes, tmp_path):
    module = fakes.FakeModule(clips()[:, :1].expand(-1, 5, -1, -1, -1), None, scale=0.0)
    data = fakes.FakeData({"video": clips()}, 0, "noise")
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics([TemporalConsistency()], steps=[1], n=9)])
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    assert found["frame_change/1"] == 0
    assert found["frame_similarity_pixels/1"] == pytest.approx(1)
    assert found["frame_change/real"] > 0.5
    assert found["frame_similarity_pixels/real"] < 0.2


def test_images_are_refused(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics([TemporalConsistency()], steps=[1], n=9)])
    with pytest.raises(UserError, match=r"frame_change: data of shape \(1, 8, 8\), expected videos of 2 frames"):
        trainer.test(module, datamodule=data, verbose=False)
