"""Small pyramids: what they are made of, and the sizes of their images."""

import pytest
import torch

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.tiny import tiny_backbone, tiny_classifier


def classifier(*args, **more):
    torch.manual_seed(0)
    return tiny_classifier(*args, num_classes=5, depth=2, **more).eval()


@torch.no_grad()
def test_gates_of_zero_are_no_interactions():
    image = torch.rand(2, 3, 64, 64)
    whole, apart = classifier([16, 64], [64, 32]), classifier([16, 64], [64, 32], interactions=False)
    apart.load_state_dict(whole.state_dict(), strict=False)
    torch.testing.assert_close(whole(image), apart(image))


@torch.no_grad()
def test_one_branch_on_a_smaller_image():
    """Of a nominal size of 64 it sees what a pyramid resizes for it."""
    image = torch.rand(2, 3, 64, 64)
    alone, small = classifier([16], [64], size=64), classifier([16], [64])
    small.load_state_dict(alone.state_dict())
    resized = torch.nn.functional.interpolate(image, scale_factor=0.25, mode="bilinear", align_corners=False)
    torch.testing.assert_close(alone(image), small(resized))
    with pytest.raises(UserError, match="size: found 32, expected at least 64"):
        classifier([16, 64], [64, 32], size=32)


def test_channels():
    with pytest.raises(UserError, match=r"dims: found 1, expected 2, one for each of sizes=\[16, 64\]"):
        classifier([16, 64], [64])
    with pytest.raises(UserError, match="dims: found 40, expected multiples of 16"):
        classifier([16, 64], [64, 40])
    assert tiny_backbone([64, 128], [64, 32]).strides == [4, 8, 16, 32]
