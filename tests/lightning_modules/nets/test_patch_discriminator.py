"""The discriminator's parts: what the blur does, sizes, and weights in number."""

import pytest
import torch

from penstock.lightning_modules.nets.patch_discriminator import Blur, PatchDiscriminator


def test_the_blur_halves_sides_and_keeps_what_is_constant():
    for side, half in ((8, 4), (7, 4), (2, 1), (1, 1)):
        assert Blur()(torch.ones(1, 2, side, side)).shape == (1, 2, half, half)
    inside = Blur()(torch.ones(1, 2, 8, 8))[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.ones_like(inside))
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 4, 4] = 1
    assert Blur()(x)[0, 0, 2, 2].item() == pytest.approx(9 / 64)
    assert Blur()(x)[0, 0, 1, 1].item() == pytest.approx(1 / 64)


def test_any_image_gives_16x16_logits_that_depend_on_it():
    net = PatchDiscriminator(width=32)
    for size in ((64, 64), (33, 50), (8, 8)):
        x = torch.rand(2, 3, *size, requires_grad=True)
        net(x).sum().backward()
        assert net(x).shape == (2, 1, 16, 16)
        assert x.grad.abs().sum() > 0


def test_weights_of_the_released_one():
    def conv(inputs, outputs, side):
        return inputs * outputs * side**2 + outputs

    widths = ((128, 128), (128, 256), (256, 512))
    expected = conv(3, 128, 5) + sum(conv(a, b, 3) + 2 * b for a, b in widths) + conv(512, 512, 1) + conv(512, 1, 5)
    assert sum(weight.numel() for weight in PatchDiscriminator().parameters()) == expected


@pytest.mark.parametrize("options", [{"stages": 0}, {"width": 48}])
def test_sizes_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="expected at least 1 and a multiple of groups=32"):
        PatchDiscriminator(**options)
