"""Losses of 2-rectified flow++: numbers of the official training step, limits, weights in time, images of any kind."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.flow.losses import Regression, SquaredError, flow_matching_loss
from penstock.lightning_modules.flow.premetrics import (
    Distance,
    Perceptual,
    PerceptualDistillation,
    PerceptualHuber,
    PseudoHuber,
    RootMeanSquare,
    for_distance,
    pseudo_huber,
)
from penstock.lightning_modules.nets.edm import EDMVelocity
from penstock.lightning_modules.nets.edm_unets import SongUNet

GOLDEN = load_file(Path(__file__).resolve().parents[2] / "golden/rectified_flow_pp/04_losses.safetensors")
EXACT = {"rtol": 1e-8, "atol": 1e-14}


class PixelDistance(Distance):
    """The stand-in of the golden file: mean squared difference of what the loss hands over."""

    def __init__(self):
        self.seen = None

    def __call__(self, images, references):
        self.seen = images, references
        return (images - references).square().flatten(1).mean(1)


LOSSES = {
    "l2": RootMeanSquare(),
    "l2-squared": SquaredError(),
    "huber": PseudoHuber(),
    "lpips": Perceptual(PixelDistance()),
    "lpips_divt": Perceptual(PixelDistance(), divide_by_time=True),
    "lpips-huber": PerceptualHuber(PixelDistance(), divide_by_time=False),
    "lpips-huber_divt": PerceptualHuber(PixelDistance()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_official_training_step(name):
    net = EDMVelocity(SongUNet((3, 8, 8), width=8, mult=(1, 2), blocks=1, attention=(4,)))
    net.load_state_dict({k.removeprefix("weights/"): v for k, v in GOLDEN.items() if k.startswith("weights/")})
    net.double()
    seen = {}

    def velocity(x, t):
        seen["x_t"], seen["v"] = x, net(x, t)
        return seen["v"]

    t = 1 - GOLDEN["in/t"]
    losses = flow_matching_loss(velocity, GOLDEN["in/z"], GOLDEN["in/x"], t, loss=LOSSES[name])
    torch.testing.assert_close(seen["x_t"], GOLDEN["out/x_t"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(-seen["v"], GOLDEN["out/v"], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(losses, GOLDEN[f"out/{name}/per_sample"], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(losses.mean(), GOLDEN[f"out/{name}/loss"], **EXACT)
    losses.mean().backward()
    prefix = f"out/{name}/grad/"
    for key in (key for key in GOLDEN if key.startswith(prefix)):
        torch.testing.assert_close(net.get_parameter(key.removeprefix(prefix)).grad, GOLDEN[key], rtol=1e-7, atol=1e-10)


def regression(prediction, target=None, t=0.4, x0=None):
    target = torch.zeros_like(prediction) if target is None else target
    x0 = torch.zeros_like(prediction) if x0 is None else x0
    times = torch.full((len(prediction),), t, dtype=prediction.dtype)
    x1 = x0 + target
    return Regression(prediction, target, (1 - t) * x0 + t * x1, x0, x1, times)


def test_huber_is_quadratic_near_and_linear_far():
    r, d = torch.randn(2, 12, dtype=torch.float64), 12
    near, far = 1e-6 * r, 1e6 * r
    torch.testing.assert_close(pseudo_huber(near, 0.3), near.square().sum(1) / (2 * 0.3 * d), rtol=1e-9, atol=0)
    torch.testing.assert_close(pseudo_huber(far, 0.3), far.norm(dim=1) / d, rtol=1e-5, atol=0)
    tiny = pseudo_huber((1e-4 * r).float(), 1.659)
    torch.testing.assert_close(tiny.double(), pseudo_huber((1e-4 * r).float().double(), 1.659), rtol=1e-5, atol=0)


def test_both_huber_constants():
    error = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    d = 3072
    for scaling, constant in (("d", 1.65888), ("sqrt_d", 0.02993)):
        expected = ((error.square().sum((1, 2, 3)) + constant**2).sqrt() - constant) / d
        torch.testing.assert_close(PseudoHuber(scaling=scaling)(regression(error)), expected, rtol=1e-4, atol=0)


def test_every_loss_is_zero_with_finite_gradient_at_the_target_even_at_the_ends_of_time():
    for t in (0.0, 0.5, 1.0):
        for loss in (*LOSSES.values(), PerceptualDistillation(PixelDistance(), add_squared_error=True)):
            target = torch.rand(2, 3, 8, 8)
            prediction = target.clone().requires_grad_()
            value = loss(regression(prediction, target, t))
            assert value.abs().max() < 1e-6
            value.sum().backward()
            assert prediction.grad.isfinite().all()


def test_only_the_huber_part_is_weighted_by_time_and_one_over_t_stays_bounded():
    prediction, target = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for t in (1e-5, 0.3, 1 - 1e-5):
        r = regression(prediction, target, t)
        p, h = Perceptual(PixelDistance())(r), PseudoHuber()(r)
        torch.testing.assert_close(PerceptualHuber(PixelDistance(), divide_by_time=False)(r), t * h + p)
        torch.testing.assert_close(PerceptualHuber(PixelDistance())(r), t * h + p / (1 - t))
    assert (PerceptualHuber(PixelDistance())(r) - t * h).max() < 1e-4


def test_distillation_steps_from_the_noise_with_length_one():
    x0, v, target = (torch.randn(2, 3, 32, 32) for _ in range(3))
    r = regression(v, target, t=1e-3, x0=x0)
    p = ((x0 + v) - (x0 + target)).square().flatten(1).mean(1) / 4
    torch.testing.assert_close(PerceptualDistillation(PixelDistance())(r), p)
    both = PerceptualDistillation(PixelDistance(), add_squared_error=True)(r)
    torch.testing.assert_close(both, p + (v - target).square().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("shape", "size", "sides"), [((1, 8, 8), None, 32), ((1, 8, 8), 64, 64), ((3, 40, 40), None, 40)]
)
def test_images_arrive_as_rgb_in_unit_range_and_only_the_prediction_has_a_gradient(shape, size, sides):
    distance = PixelDistance()
    prediction = torch.rand(2, *shape, requires_grad=True)
    Perceptual(distance, size=size)(regression(prediction, t=0.0)).sum().backward()
    images, references = distance.seen
    assert images.shape == references.shape == (2, 3, sides, sides)
    assert images.min() >= 0.5
    assert prediction.grad.abs().sum() > 0
    assert not references.requires_grad


def test_errors_are_clear():
    with pytest.raises(ValueError, match=r"needs images \(B, 1 or 3, H, W\), got \(2, 5\)"):
        for_distance(torch.zeros(2, 5), 32)
    for build in (PseudoHuber, lambda c: PerceptualHuber(PixelDistance(), c=c)):
        with pytest.raises(ValueError, match=r"Huber.c must be positive, got 0"):
            build(c=0)
    assert math.isfinite(PseudoHuber().c)
