"""Losses of a discriminator by hand, and Haar coefficients against their definition."""

import pytest
import torch

from penstock.lightning_modules.flow.adversarial import haar, haar_distance, hinge, lecam


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert hinge(torch.ones(3), -torch.ones(3)) == 0


def test_lecam_by_hand():
    real, fake = torch.tensor(2.0), torch.tensor(-1.5)
    assert lecam(real, fake, torch.tensor(0.25), torch.tensor(-0.5)).item() == (2 + 0.5) ** 2 + (0.25 + 1.5) ** 2
    assert lecam(real, fake, torch.tensor(-2.0), torch.tensor(4.0)) == 0


def test_haar_is_orthonormal_and_its_first_coefficient_the_mean():
    x = torch.randn(2, 4, 3, 6, 8, dtype=torch.float64)
    found = haar(x)
    assert found.shape == (2, 2, 3, 3, 4, 8)
    torch.testing.assert_close(found.square().sum(), x.square().sum())
    cube = x[1, 2:4, 0, 4:6, 2:4]
    torch.testing.assert_close(found[1, 1, 0, 2, 1, 0], cube.sum() / 8**0.5)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    waves = [torch.ones(2, dtype=torch.float64), signs]
    expected = [torch.einsum("thw,t,h,w", cube, a, b, c).item() / 8**0.5 for a in waves for b in waves for c in waves]
    assert sorted(found[1, 1, 0, 2, 1].tolist()) == pytest.approx(sorted(expected))


def test_odd_sides_repeat_their_last_entry():
    x = torch.randn(1, 5, 1, 3, 2)
    padded = torch.cat([x, x[:, -1:]], 1)
    padded = torch.cat([padded, padded[:, :, :, -1:]], 3)
    assert haar(x).equal(haar(padded))


def test_the_distance_is_the_mean_absolute_difference():
    a, b = torch.randn(2, 1, 4, 3, 4, 4).unbind(0)
    torch.testing.assert_close(haar_distance(a, b), (haar(a) - haar(b)).abs().mean())
