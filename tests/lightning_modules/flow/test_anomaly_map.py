"""Maps and scores of FastFlow against closed forms and SciPy; tiles against the whole image."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from penstock.lightning_modules.flow.anomaly_map import anomaly_map, blurred, image_score
from penstock.lightning_modules.flow.tiles import ramp, starts, tiled


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_of_known_noise():
    assert anomaly_map([torch.zeros(2, 3, 4, 4)], (8, 8)).eq(-1).all()
    ones = anomaly_map([torch.ones(1, 3, 4, 4)], (8, 8))
    torch.testing.assert_close(ones, torch.full_like(ones, -0.60653066))


def test_scales_are_averaged():
    z = [noise(2, 6, 8, 8), noise(2, 9, 4, 4, seed=1), noise(2, 12, 2, 2, seed=2)]
    each = torch.stack([anomaly_map([one], (32, 24)) for one in z]).mean(0)
    torch.testing.assert_close(anomaly_map(z, (32, 24)), each, rtol=0, atol=1e-12)


def test_a_louder_place_becomes_the_largest():
    z = noise(1, 16, 8, 8)
    before = image_score(anomaly_map([z], (8, 8)))
    z[..., 5, 2] *= 3
    found = anomaly_map([z], (8, 8))
    assert found.flatten().argmax() == 5 * 8 + 2
    assert image_score(found) > before


def test_half_precision_noise_does_not_underflow_early():
    z = torch.full((1, 2, 4, 4), math.sqrt(2 * 17.5), dtype=torch.bfloat16)
    assert anomaly_map([z], (4, 4)).dtype == torch.float32
    assert -1e-7 < anomaly_map([z], (4, 4)).max() < 0


@pytest.mark.parametrize("sigma", [0.8, 3.0])
def test_blur_is_scipys(sigma):
    maps = noise(2, 1, 40, 33)
    expected = np.stack([gaussian_filter(m, sigma, mode="mirror", truncate=4) for m in maps[:, 0].numpy()])
    np.testing.assert_allclose(blurred(maps, sigma)[:, 0].numpy(), expected, atol=1e-12)


def test_blur_of_nothing_and_of_tiny_maps():
    maps = noise(1, 1, 3, 3)
    assert blurred(maps, 0.0) is maps
    assert blurred(maps, 5.0).shape == maps.shape
    assert blurred(torch.ones(1, 1, 9, 9), 2.0).sub(1).abs().max() < 1e-6


def test_score_of_a_share_of_pixels():
    maps = noise(3, 1, 10, 10)
    ordered = maps.flatten(1).sort(1, descending=True).values
    torch.testing.assert_close(image_score(maps), ordered[:, 0])
    torch.testing.assert_close(image_score(maps, 0.05), ordered[:, :5].mean(1))
    torch.testing.assert_close(image_score(maps, 1.0), maps.flatten(1).mean(1))


@pytest.mark.parametrize(("length", "tile", "overlap"), [(64, 64, 0.25), (65, 64, 0.25), (300, 64, 0.5), (100, 7, 0.0)])
def test_tiles_cover_the_image_and_overlap(length, tile, overlap):
    found = starts(length, tile, overlap)
    assert found[0] == 0
    assert found[-1] == length - tile
    assert max(np.diff(found), default=0) <= max(1, tile * (1 - overlap))


def test_tiles_of_a_map_without_context_are_the_whole_map():
    image = noise(2, 3, 50, 70)
    mapped = lambda x: x.square().mean(1, keepdim=True)  # noqa: E731
    torch.testing.assert_close(tiled(mapped, image, (32, 24), 0.25, batch=5), mapped(image))
    assert (ramp(8, image) > 0).all()


def test_tiles_of_a_map_with_context_are_nearly_the_whole_map():
    image = noise(1, 1, 96, 96)
    mapped = lambda x: F.avg_pool2d(x, 5, 1, 2)  # noqa: E731
    whole, found = mapped(image), tiled(mapped, image, (48, 48), 0.5)
    assert (whole - found)[..., 4:-4, 4:-4].abs().max() < 0.2 * whole.abs().max()
    assert (whole - found).abs().mean() < 0.01 * whole.abs().max()


def test_images_smaller_than_a_tile_are_refused():
    with pytest.raises(ValueError, match="16x16 pixels: expected at least 32x32"):
        tiled(lambda x: x, torch.zeros(1, 1, 16, 16), (32, 32), 0.25)
