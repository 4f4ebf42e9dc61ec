"""Flows of STARFlow whose samples have another aspect than in training."""

import pytest
import torch

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.inverse import Sequential
from penstock.lightning_modules.nets.aspects import ASPECTS, aspect_size
from penstock.lightning_modules.nets.starflow import STARFlow, at_aspect
from penstock.lightning_modules.nets.tarflow import TARFlow


def flow(shape, patch=1, **options):
    torch.manual_seed(0)
    net = STARFlow(shape, 32, (1, 1), head_dim=32, patch=patch, **options).double()
    for block in net.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    return net


@pytest.mark.parametrize("aspect", ASPECTS)
def test_sizes_are_those_of_the_datas_buckets(aspect):
    """Clips of 480p in latents of a sixteenth, as `Video` sorts them by `size=640 multiple=16`."""
    with torch.device("meta"):
        net = STARFlow((21, 48, 30, 53), 32, (1, 1), head_dim=32)
    height, width = at_aspect(net, aspect).shape[-2:]
    assert (16 * height, 16 * width) == aspect_size(aspect, 640, 16)
    assert net.shape[:2] == (21, 48)


@pytest.mark.parametrize("front", [(), (2,)], ids=["image", "clip"])
def test_weights_and_range_of_places_stay_and_samples_come_back(front):
    net = at_aspect(flow((*front, 1, 16, 16), patch=2), "16:9")
    assert net.shape == (*front, 1, 12, 22)
    assert net.blocks[0].rotary.side == 8, "of training"
    x = torch.randn(2, *net.shape, dtype=torch.double)
    z = net(x).z
    torch.testing.assert_close(z, flow((*front, 1, 12, 22), patch=2, side=8)(x).z)
    torch.testing.assert_close(net.decode(z, Sequential())[0], x)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"aspect=16x9: expected one of 21:9, .* \(did you mean '16:9'\?\)"):
        at_aspect(flow((1, 8, 8)), "16x9")
    line = "aspect=3:2: 8x8 becomes 6x10 in patches of 2x2, which is nearer to 16:9; expected one of 16:9, 1:1, 9:16"
    with pytest.raises(UserError, match=line):
        at_aspect(flow((1, 8, 8), patch=2), "3:2")
    with pytest.raises(UserError, match="aspect=16:9: TARFlow has samples of its own shape only, expected a STARFlow"):
        at_aspect(TARFlow((1, 8, 8), dim=32, blocks=1, depth=1, head_dim=32), "16:9")
