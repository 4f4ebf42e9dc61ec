"""Thresholds of anomaly models: set, kept, moved, exported, refused."""

import pytest
import torch

from penstock.lightning_modules.calibration import Calibration
from penstock.lightning_modules.errors import UserError


def calibrated():
    calibration = Calibration()
    calibration.set(-0.3, -0.2, (-0.9, -0.1), (-1.0, 0.0))
    return calibration


def test_nothing_is_set_at_first():
    calibration = Calibration()
    shapes = {name: tuple(value.shape) for name, value in calibration.named_buffers()}
    expected = {"image_threshold": (), "pixel_threshold": (), "score_range": (2,), "map_range": (2,), "measured": (0,)}
    assert shapes == expected
    assert all(value.dtype == torch.float64 and value.isnan().all() for value in calibration.buffers())
    with pytest.raises(UserError, match=r"calibration.image_threshold: never set, expected .* callbacks=anomaly"):
        calibration.scores(torch.zeros(2))
    with pytest.raises(UserError, match=r"calibration.pixel_threshold: never set, .* on images with masks; "):
        calibration.maps(torch.zeros(2))


def test_threshold_lies_at_a_half():
    calibration = calibrated()
    scores = torch.tensor([-0.9, -0.7, -0.3, -0.1, 0.3])
    expected = torch.tensor([0.0, 0.0, 0.5, 0.75, 1.0])
    torch.testing.assert_close(calibration.scores(scores), expected)
    maps = torch.tensor([-1.0, -0.2, 0.0]).view(1, 1, 1, 3)
    torch.testing.assert_close(calibration.maps(maps), torch.tensor([0.0, 0.5, 0.7]).view(1, 1, 1, 3))
    calibration.set(1.0, None, (1.0, 1.0))
    assert calibration.scores(torch.tensor([0.0, 1.0, 2.0])).tolist() == [0, 0.5, 1]
    with pytest.raises(UserError, match="pixel_threshold"):
        calibration.maps(maps)


def test_colours_have_the_threshold_in_the_middle_or_the_range_at_their_ends():
    maps = torch.tensor([-1.2, -1.0, -0.25, 0.0, 0.1]).view(1, 1, 1, 5)
    assert torch.equal(calibrated().colours(maps), calibrated().maps(maps))
    calibration = Calibration()
    calibration.set(-0.3, None, (-0.9, -0.1), (-1.0, 0.0))
    torch.testing.assert_close(calibration.colours(maps).flatten(), torch.tensor([0.0, 0.0, 0.75, 1.0, 1.0]))
    calibration.set(-0.3, None, None, (0.1, 0.1))
    assert calibration.colours(maps).flatten().tolist()[:4] == [0, 0, 0, 0]
    with pytest.raises(UserError, match=r"calibration.map_range: never set, expected .*\(AnomalyMetrics\); train"):
        Calibration().colours(maps)


def test_is_kept_with_the_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), calibrated())
    torch.save(model.state_dict(), tmp_path / "weights")
    other = torch.nn.Sequential(torch.nn.Linear(1, 1), Calibration())
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), other.buffers()))
    other.bfloat16()
    assert other[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), other.buffers()))
    assert all(value.is_meta for value in other.to("meta").buffers())


def test_can_be_exported():
    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calibration = calibrated()

        def forward(self, x):
            return self.calibration.maps(x)

    x = torch.linspace(-1, 0, 7)
    exported = torch.export.export(Scored(), (x,)).module()
    assert torch.equal(exported(x), Scored()(x))


def test_thresholds_of_other_settings_are_refused():
    """The settings at which they were set are kept with the weights; checkpoints without them are taken as they are."""
    one = Calibration({"model.top": [0.03], "model.tile": (0, 0)})
    assert one.changed() is None
    one.set(-0.3, -0.2, (-0.9, -0.1), (-1.0, 0.0))
    assert one.changed() is None
    assert set(one.facts()) == {"image_threshold", "pixel_threshold", "score_range", "map_range"}
    for settings, words in (
        (
            {"model.top": [0], "model.tile": (0, 0)},
            "model.top: found 0, but .* were set with 0.03; leave it, or calibrate",
        ),
        ({"model.top": [0.03], "model.tile": (64, 32)}, r"model.tile: found \[64, 32\], .* were set with \[0, 0\]"),
    ):
        other = Calibration(settings)
        other.load_state_dict(one.state_dict())
        with pytest.raises(UserError, match=words):
            other.check_settings()
        other.set(-0.5, None, (-1, 0))
        other.check_settings()
    state = one.state_dict()
    del state["measured"]
    old = Calibration({"model.top": [0], "model.tile": (0, 0)})
    old.load_state_dict(state)
    assert old.changed() is None
    assert float(old.image_threshold) == -0.3
