"""Deformable convolution against torchvision's, values and gradients."""

import pytest
import torch
from torchvision.ops import deform_conv2d

from penstock.lightning_modules.nets.deformable import deformed


@pytest.mark.parametrize("size", [(16, 20), (7, 5), (3, 3)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 1, 0)])
@pytest.mark.parametrize("reach", [0.0, 0.7, 6.0])
def test_as_torchvision(size, kernel, stride, padding, reach):
    """Offsets of 6 lead far outside of the map."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, columns = ((n + 2 * padding - kernel) // stride + 1 for n in size)
    offset = draw(2, 2 * kernel**2, rows, columns) * reach
    given = [x.requires_grad_() for x in (draw(2, 4, *size), offset, draw(6, 4, kernel, kernel), draw(6))]
    found, expected = (f(*given, stride, padding) for f in (deformed, deform_conv2d))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weight = draw(*found.shape)
    pairs = zip(torch.autograd.grad(found, given, weight), torch.autograd.grad(expected, given, weight))
    for k, (one, other) in enumerate(pairs):
        if reach or k != 1:  # at whole pixels the slope along an offset is not defined
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
