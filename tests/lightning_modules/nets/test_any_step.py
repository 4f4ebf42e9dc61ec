"""Networks of one time with a second one: the untouched network at r = t, another one beyond (t = 0 noise, 1 data)."""

import pytest
import torch
from torch import nn

from penstock.lightning_modules.nets.any_step import AnyStep, HalfTime
from penstock.lightning_modules.nets.dit import DiT
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.nets.unet import UNet

SHAPE = (3, 8, 8)
NETS = {
    "UNet": lambda: UNet(SHAPE, width=8, num_classes=4),
    "DiT": lambda: DiT(SHAPE, patch=4, dim=32, depth=2, heads=2, num_classes=4),
    "NCSNpp": lambda: NCSNpp(SHAPE, width=8, mult=(1, 2), blocks=1, attention=(4,), num_classes=4),
}


def built(name, seed=0):
    """A network whose last layers are not at zero."""
    torch.manual_seed(seed)
    net = NETS[name]()
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return net.eval()


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, *SHAPE, generator=generator), torch.tensor([0.0, 0.25, 0.75, 1.0]), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_at_r_equal_to_t_it_is_the_untouched_network(name, given):
    x, t, cond = given
    expected, net = built(name)(x, t, cond), AnyStep(built(name))
    for found in (net(x, t, cond, t), net(x, t, cond)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.05
    assert (net.shape, net.num_classes, net.twin) == (SHAPE, 4, True)
    assert ((net(x, t, cond, t + 0.1) - expected).abs().amax((1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize("name", NETS)
def test_both_embeddings_learn_and_the_twin_has_times_of_its_own(name, given):
    x, _, cond = given
    net, t = AnyStep(built(name)), torch.tensor([0.0, 0.3, 0.6, 0.9])
    assert ((net(x, 2 - t, cond) - net(x, t, cond)).abs().amax((1, 2, 3)) > 1e-4).all()
    net(x, t, cond, torch.ones(4)).square().mean().backward()
    second_time = net.net.get_submodule(net.place)
    for part in (second_time.first, second_time.second):
        assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in part.parameters())


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_one_number_for_both_times(name, given):
    x, t, cond = given
    net, plain = HalfTime(built(name)), built(name)
    torch.testing.assert_close(net(x, t, cond, torch.ones(4)), plain(x, t, cond))
    torch.testing.assert_close(net(x, t, cond), plain(x, 0.5 + t / 2, cond))


def test_a_network_without_a_time_module_or_without_a_start_is_refused():
    with pytest.raises(ValueError, match="Linear has no module 'time', expected its time embedding"):
        AnyStep(nn.Linear(2, 2))
    fourier = NCSNpp(SHAPE, width=8, mult=(1, 2), blocks=1, attention=(), embedding="fourier")
    with pytest.raises(ValueError, match="NCSNpp does not know t = 0, expected embedding=positional"):
        AnyStep(fourier)
