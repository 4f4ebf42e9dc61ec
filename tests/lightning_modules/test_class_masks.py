"""Windows against loops, and a loss to which pixels without a class are nothing."""

import pytest
import torch
from torch.nn import functional as F

from penstock.lightning_modules.class_masks import IGNORED, pixel_loss, resized_scores, slid


def local(image):
    """Scores that see a neighbourhood, so that windows differ at their edges."""
    kernel = torch.randn(4, 3, 5, 5, dtype=image.dtype, generator=torch.Generator().manual_seed(0))
    return F.conv2d(image, kernel, padding=2)


@pytest.mark.parametrize("size", [(40, 57), (24, 24), (20, 31), (25, 24), (48, 24)])
def test_windows_are_averaged(size):
    """The starts are written out as mmsegmentation has them."""
    image, window, stride = torch.randn(2, 3, *size, dtype=torch.float64), 24, 10
    total, count = torch.zeros(2, 4, *size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    grids = [max(side - window + stride - 1, 0) // stride + 1 for side in size]
    for i in range(grids[0]):
        for j in range(grids[1]):
            y2, x2 = min(i * stride + window, size[0]), min(j * stride + window, size[1])
            y1, x1 = max(y2 - window, 0), max(x2 - window, 0)
            total[..., y1:y2, x1:x2] += local(image[..., y1:y2, x1:x2])
            count[y1:y2, x1:x2] += 1
    assert count.min() > 0
    assert (slid(local, image, window, stride) - total / count).abs().max() < 1e-12


def test_a_window_that_covers_the_image_is_the_whole():
    image = torch.randn(2, 3, 20, 31)
    assert torch.equal(slid(local, image, 31, 7), local(image))
    assert not torch.allclose(slid(local, image, 16, 8), local(image))


def test_loss_of_padded_borders_is_nothing():
    scores = torch.randn(2, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(0, 5, (2, 12, 16), dtype=torch.uint8)
    mask[0, 9:], mask[1, :, 5:] = IGNORED, IGNORED
    loss = pixel_loss(scores, mask)
    wide = F.interpolate(scores.float(), size=(12, 16), mode="bilinear", align_corners=False)
    terms = [-wide[k].log_softmax(0)[mask[k, y, x].long(), y, x] for k, y, x in (mask != IGNORED).nonzero().tolist()]
    assert len(terms) == 9 * 16 + 12 * 5
    assert (loss - torch.stack(terms).mean()).abs() < 1e-6
    (slope,) = torch.autograd.grad(loss, scores)
    assert (slope[0, :, 5:] == 0).all()
    assert (slope[1, :, :, 4:] == 0).all()
    assert (slope[0, :, :4] != 0).all()
    nothing = pixel_loss(scores, torch.full_like(mask, IGNORED))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, scores)[0] == 0).all()


def test_scores_of_the_right_size_stay():
    scores = torch.randn(1, 2, 3, 4)
    assert resized_scores(scores, (3, 4)) is scores
