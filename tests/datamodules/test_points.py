import numpy as np
import pytest
import torch

from penstock.datamodules.pair import Pair
from penstock.datamodules.points import Points
from penstock.lightning_modules.errors import UserError


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def cloud(data, split="train"):
    batches = list(data.reference_dataloader(split))
    labels = torch.cat([b["label"] for b in batches]) if "label" in batches[0] else None
    return torch.cat([b["points"] for b in batches]).double(), labels


MODES = {
    "three_modes": [(8.660254, -5), (-8.660254, -5), (0, 8.660254)],
    "three_modes_source": [(-8.660254, 5), (8.660254, 5), (0, -8.660254)],
}


@pytest.mark.parametrize("name", MODES)
def test_three_modes_are_those_of_the_sheet(name):
    data = ready(Points(name, size=20_000))
    points, labels = cloud(data)
    assert (data.shape, data.num_classes) == ((2,), 3)
    for k, mean in enumerate(MODES[name]):
        mode = points[labels == k]
        assert abs(len(mode) / 20_000 - 1 / 3) < 0.015
        torch.testing.assert_close(mode.mean(0), torch.tensor(mean).double(), atol=0.03, rtol=0)
        torch.testing.assert_close(mode.var(0), torch.full((2,), 0.3).double(), atol=0.02, rtol=0)


def test_cost_of_the_independent_coupling_is_the_sheets():
    data = ready(Pair(Points("three_modes_source", 20_000), Points("three_modes", 20_000)))
    batches = list(data.train_dataloader())
    x1, x0 = (torch.cat([b[key] for b in batches]) for key in ("points", "source"))
    assert ((x1 - x0) ** 2).sum(1).mean().item() == pytest.approx(184.932, rel=0.02)


def test_eight_gaussians_lie_on_their_circle():
    points, labels = cloud(ready(Points("eight_gaussians", 20_000)))
    for k in range(8):
        centre = 2 * torch.tensor([np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)])
        torch.testing.assert_close(points[labels == k].mean(0), centre, atol=0.02, rtol=0)


def test_checkerboard_fills_the_dark_squares_alone():
    data = ready(Points("checkerboard", 20_000))
    points, labels = cloud(data)
    cells = points.floor().long() + 2
    assert cells.min() == 0
    assert cells.max() == 3
    assert ((cells.sum(1) % 2) == 0).all()
    assert data.num_classes == 8
    assert all(len(cells[labels == k].unique(dim=0)) == 1 for k in range(8))
    assert len(cells.unique(dim=0)) == 8


def test_spiral_radius_grows_with_its_angle():
    points, labels = cloud(ready(Points("two_spirals", 5000, noise=0.0)))
    radius = points.norm(dim=1)
    angle = torch.atan2(points[:, 1], points[:, 0]) + labels * torch.pi
    turns = (radius * torch.pi - angle) / (2 * torch.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-5, rtol=0)
    assert radius.max() <= 3 + 1e-6


def test_gaussian_has_its_moments_and_no_labels():
    data = ready(Points("gaussian", 40_000, noise=0.5, mean=3.0))
    points, labels = cloud(data)
    assert labels is None
    assert data.num_classes == 0
    torch.testing.assert_close(points.mean(0), torch.full((2,), 3.0).double(), atol=0.012, rtol=0)
    torch.testing.assert_close(points.std(0), torch.full((2,), 0.5).double(), atol=0.01, rtol=0)


def test_moons_have_two_classes():
    assert ready(Points("moons", 1000)).num_classes == 2


def test_splits_are_independent_and_reproducible():
    data = ready(Points("moons", 1000))
    train, val, test = (cloud(data, s)[0] for s in ("train", "val", "test"))
    assert (len(train), len(val), len(test), len(data.view("all"))) == (1000, 100, 100, 1200)
    assert not torch.equal(val, test)
    assert torch.equal(train, cloud(ready(Points("moons", 1000)))[0])
    assert not torch.equal(train, cloud(ready(Points("moons", 1000, seed=1)))[0])


def test_the_seed_of_the_run_leaves_the_points_alone(monkeypatch):
    before = ready(Points("moons", 100)).fingerprint
    monkeypatch.setenv("PL_GLOBAL_SEED", "99")
    assert ready(Points("moons", 100)).fingerprint == before
    assert ready(Points("moons", 100, noise=0.2)).fingerprint != before


def test_bad_settings_name_the_key():
    with pytest.raises(UserError, match=r"data.name: found 'moon', expected one of .*did you mean 'moons'"):
        Points("moon")
    with pytest.raises(UserError, match=r"data.size: found 3, expected at least 10"):
        Points(size=3)
    with pytest.raises(UserError, match=r"data.noise: found -1.0, expected at least 0"):
        Points(noise=-1.0)
    with pytest.raises(UserError, match=r"data.mean: found 2.0, but only the toy 'gaussian' has a mean"):
        Points("moons", mean=2.0)
