"""Stable Diffusion's U-Net as a velocity field, with a stand-in that knows the answer."""

import pytest
import torch
from torch import nn

from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.solvers import DPMSolverPP2M
from penstock.lightning_modules.nets.stable_diffusion import StableDiffusion

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
LEVELS = (1 - BETAS).cumprod(0)
SHAPE, MEAN, STD = (4, 2, 2), 0.7, 0.4
NULL = torch.zeros(3, 5)


class GaussianNoise(nn.Module):
    """`E[e | x_vp]` for data N(MEAN, STD^2), at network times read by the same interpolation in log(a / s)."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, times, encoder_hidden_states, return_dict):
        self.asked.append(times)
        ratio = 0.5 * torch.logit(LEVELS)
        left = times.double().floor().long().clamp(max=998)
        level = torch.lerp(ratio[left], ratio[left + 1], times.double() - left)
        a = torch.sigmoid(2 * level).sqrt().view(-1, 1, 1, 1)
        s = torch.sigmoid(-2 * level).sqrt().view(-1, 1, 1, 1)
        return (s * (x - a * MEAN) / (a**2 * STD**2 + s**2),)


class Recorder(nn.Module):
    """Remembers the network times and answers with the state."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, times, encoder_hidden_states, return_dict):
        self.asked.append(times)
        return (x + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1),)


def noise_net():
    return StableDiffusion(GaussianNoise(), NULL, SHAPE, "noise", LEVELS)


def test_the_noise_of_a_diffusion_is_the_velocity_of_the_straight_flow():
    net = noise_net()
    x = torch.randn(400, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(net.t_min + 1e-9, 0.971, 400, dtype=torch.float64)
    exact = MixtureFlow(Mixture.gaussian(torch.full((16,), MEAN, dtype=torch.float64), STD))
    expected = exact.velocity(x.flatten(1), t).view_as(x)
    assert (net(x, t) - expected).abs().max() < 1e-6


def test_the_velocity_goes_on_to_both_ends():
    net = noise_net()
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    low, here = net(x, torch.full((3,), net.t_min - 1e-7)), net(x, torch.full((3,), net.t_min + 1e-7))
    torch.testing.assert_close(low, here, atol=1e-4, rtol=0)
    ends = net(x, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert ends.isfinite().all()
    assert net.unet.asked[-1][0] == 999
    assert net.unet.asked[-1][2] == 0


def test_25_solver_steps_reach_the_data():
    """The last step lands on the mean of the data given the state before it, which shrinks the spread."""
    net = noise_net()
    times = net.times(25)
    assert float(times[0]) == pytest.approx(net.t_min)
    assert times[-1] == 1
    assert (times.diff() > 0).all()
    x = torch.randn(4000, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = DPMSolverPP2M()(net, x * torch.hypot(times[0], 1 - times[0]), times).x
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.02)
    noise = float((1 - times[-2]) / times[-2])
    assert float(end.std()) == pytest.approx(STD**2 / (STD**2 + noise**2) ** 0.5, abs=0.01)


def test_velocity_is_the_plain_output_at_1000_to_0():
    net = StableDiffusion(Recorder(), NULL, SHAPE)
    x = torch.randn(5, *SHAPE)
    assert torch.equal(net(x, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])), x)
    assert net.unet.asked[0].tolist() == [1000.0, 750.0, 500.0, 250.0, 0.0]
    assert net.unet.asked[0].is_floating_point()
    assert torch.equal(net.times(4), torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))
    assert (net.num_classes, net.shape, net.t_min) == (0, SHAPE, 0.0)


def test_a_dropped_prompt_is_the_empty_one():
    net = StableDiffusion(Recorder(), torch.full((3, 5), -1.0), SHAPE)
    cond = torch.ones(2, 3, 5)
    dropped = net.drop_condition(cond, torch.tensor([False, True]))
    assert torch.equal(dropped, torch.stack([torch.ones(3, 5), -torch.ones(3, 5)]))
    x, t = torch.zeros(2, *SHAPE), torch.zeros(2)
    assert torch.equal(net(x, t), net(x, t, net.drop_condition(cond, torch.tensor([True, True]))))
    with pytest.raises(ValueError, match=r"expected prompt features \(B, 3, 5\), got \(2, 4, 5\)"):
        net.drop_condition(torch.ones(2, 4, 5), torch.tensor([True, True]))
    assert "null_text" not in net.state_dict()
    with pytest.raises(ValueError, match="'noise' needs alphas_cumprod"):
        StableDiffusion(Recorder(), NULL, SHAPE, "noise")
