"""TwinFlow's losses: fixed points in closed form, gradients, blocks, calls of the network, what is refused."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.blocks import Shares
from penstock.lightning_modules.flow.losses import SquaredError
from penstock.lightning_modules.flow.twinflow import TwinObjective, untracked
from penstock.lightning_modules.nets.any_step import AnyStep
from penstock.lightning_modules.nets.mlp import MLP
from penstock.lightning_modules.nets.text_encoder import HashedText
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.twinflow import TwinFlow

M, S = 2.0, 0.5
ONLY_E2E = Shares(e2e=1.0, mul=0.0, any=0.0, adv=0.0)


class AffineFlow(nn.Module):
    """`x_1 = a x_0 + b` from 0 to 1; for the rest exact: the velocity of N(2, 0.25), and of its samples at t > 1.

    With `coupled` the twin has the velocity of samples paired with the noise that made them.
    """

    shape, num_classes = (1,), 0

    def __init__(self, coupled=False):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.coupled = coupled

    def field(self, x, t, mean, std):
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)

    def forward(self, x, t, cond=None, r=None):
        t = t[:, None]
        if r is not None and bool((r[:, None] > t).any()):
            return self.a * x + self.b - x
        here = torch.where(t > 1, 2 - t, t)
        if self.coupled:
            noise = (x - here * self.b) / (1 - here + here * self.a)
            twin = self.a * noise + self.b - noise
        else:
            twin = self.field(x, here, self.b, self.a)
        return torch.where(t > 1, twin, self.field(x, here, M, S))


def draws(n, seed=0, epoch=0):
    return Draws(seed, epoch, torch.arange(n))


def model(net, **options):
    return TwinFlow(net, torch.optim.SGD, **{"ema_decay": 0.0, "loss": SquaredError(), **options})


def rectified(net, steps, n=1024):
    """`a, b` after SGD on the rectification alone."""
    flow = TwinFlow(net, torch.optim.SGD, ema_decay=0.0, loss=SquaredError(), order=0, shares=ONLY_E2E)
    x1, optimizer = torch.zeros(n, 1), torch.optim.SGD(net.parameters(), 0.05)
    for step in range(steps):
        optimizer.zero_grad()
        flow.terms(x1, None, flow.drawn(x1, draws(n, epoch=step))).rectify.mean().backward()
        optimizer.step()
    return float(net.a.detach()), float(net.b.detach())


def test_rectification_finds_the_distribution():
    a, b = rectified(AffineFlow(), 300)
    assert a == pytest.approx(0.5, abs=0.02)
    assert b == pytest.approx(2.0, abs=0.02)


def test_rectification_with_the_other_sign_diverges(monkeypatch):
    gap = TwinObjective.gap
    monkeypatch.setattr(TwinObjective, "gap", lambda *given: -gap(*given))
    _, b = rectified(AffineFlow(), 100)
    assert b == pytest.approx(-9.8, abs=0.3)


def test_a_twin_that_learnt_from_coupled_noise_has_a_wrong_fixed_point():
    a, b = rectified(AffineFlow(coupled=True), 300)
    assert a == pytest.approx(0.68, abs=0.03)
    assert b == pytest.approx(2.0, abs=0.03)


def test_guidance_of_the_own_prediction_is_a_scale_of_one_over_one_minus_the_ratio():
    """`v = 1`, `u_e = 0`, w = 0.8: what the network learns at its fixed point is 5."""

    class Constant(nn.Module):
        shape, num_classes, learnt = (1,), 2, 1.0

        def forward(self, x, t, cond=None, r=None):
            return self.learnt * (cond > 0).float()[:, None].expand_as(x)

        def drop_condition(self, cond, mask):
            return torch.where(mask, 0, cond)

    net = Constant()
    flow = model(net, enhanced_ratio=0.8)
    x, v, t = torch.zeros(4, 1), torch.ones(4, 1), torch.full((4,), 0.5)
    for _ in range(120):
        found = flow.objective.guided(net, v, x, t, torch.ones(4, dtype=torch.long), None)
        net.learnt = float(found.mean())
    assert net.learnt == pytest.approx(5.0, abs=1e-4)
    outside = model(net, enhanced_ratio=0.8, enhanced_range=(0.5, 0.7))
    assert torch.equal(outside.objective.guided(net, v, x, t, torch.ones(4, dtype=torch.long), None), v)


# ------------------------------------------------------------------ a real network


def unet(**options):
    torch.manual_seed(0)
    net = UNet((1, 8, 8), width=8, num_classes=4, **options)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.1)
    return net


@torch.no_grad()
def changed(net):
    torch._foreach_mul_([*net.parameters()], 1.1)


def batch(n=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 4


def terms_of(flow, n=16, **changes):
    x1, cond = batch(n)
    return flow.terms(x1, cond, flow.drawn(x1, draws(n))._replace(**changes))


def test_the_rectification_sends_its_gradient_through_the_jump_only():
    flow = model(unet(), shares=ONLY_E2E)
    jump, calls, forward = [], [], flow.net.forward

    def watched(x, t, cond=None, r=None):
        calls.append(torch.is_grad_enabled())
        u = forward(x, t, cond, r)
        if torch.is_grad_enabled():
            jump.append(u)
            return u.detach().requires_grad_()
        return u

    flow.net.forward = watched
    terms_of(flow).rectify.sum().backward()
    assert calls.count(True) == 1
    assert all(weight.grad is None for weight in flow.net.parameters())


def test_generated_data_get_no_gradient_from_the_adversarial_loss():
    flow = model(unet(), shares=Shares(e2e=0.0, mul=0.0, any=0.0, adv=1.0))
    x1, cond = batch()
    d = flow.drawn(x1, draws(16))
    noise = d.adv_noise.clone().requires_grad_()
    terms = flow.terms(x1, cond, d._replace(adv_noise=noise))
    assert not torch.equal(terms.target, x1 - d.noise)
    terms.base.sum().backward()
    assert noise.grad is None


def test_new_noise_changes_the_rectification_only():
    one, other = terms_of(model(unet())), terms_of(model(unet()), twin_noise=torch.randn(4, 1, 8, 8))
    assert torch.equal(one.base, other.base)
    assert not torch.equal(one.rectify, other.rectify)


def test_order_0_is_flow_matching():
    flow = model(unet(), order=0, consistency=0.0, shares=Shares(0.0, 1.0, 0.0, 0.0, 0.0))
    x1, cond = batch()
    d = flow.drawn(x1, draws(16))
    terms = flow.terms(x1, cond, d)
    t = d.t.reshape(-1, 1, 1, 1)
    u = flow.net(t * x1 + (1 - t) * d.noise, d.t, cond)
    expected = (u - (x1 - d.noise)).square().flatten(1).mean(1)
    torch.testing.assert_close(terms.base, expected * (torch.tan(torch.tensor(torch.pi / 2.5)) + 1))
    assert terms.rectify is None


def test_short_steps_alone_are_any_step_too_and_losses_get_times_of_the_data():
    seen = {}

    class Watching(SquaredError):
        def __call__(self, regression):
            seen["t"] = regression.t
            return super().__call__(regression)

    flow = model(unet(), shares=Shares(e2e=0.0, mul=1.0, any=0.0, adv=1.0), near=1.0, rectify=0.0, loss=Watching())
    x1, cond = batch()
    terms = flow.terms(x1, cond, flow.drawn(x1, draws(16)))
    assert not torch.allclose(terms.target[terms.rows["mul"]], terms.velocity[terms.rows["mul"]])
    assert bool(((seen["t"] >= 0) & (seen["t"] <= 1)).all())


def test_image_free_training_reads_no_image():
    flow = model(unet(), image_free=True, ema_decay=1.0, enhanced_ratio=2.0)
    x1, cond = batch()
    terms = flow.terms(torch.full_like(x1, torch.nan), cond, flow.drawn(x1, draws(16)))
    assert terms.base.isfinite().all()
    assert terms.rectify.isfinite().all()


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 16 + 4 + 2 * 12 + 2 * 4),
        ({"enhanced_ratio": 0.5}, 16 + 4 + 2 * 12 + 2 * 4 + 2 * 8),
        ({"order": 3}, 16 + 4 + 3 * 12 + 2 * 4),
        ({"rectify": 0.0, "shares": Shares(adv=0.0), "order": 1}, 16 + 16),
        ({"image_free": True}, 12 + 16 + 4 + 2 * 12 + 2 * 4),
        ({"order": 0, "consistency": 0.0, "shares": Shares(0.0, 1.0, 0.0, 0.0, 0.0)}, 16),
    ],
)
def test_every_call_is_accounted_for(options, rows):
    """Rows that the network sees in a step on 16: the batch, the generated quarter, N for each real one, the gap."""
    flow, seen = model(unet(), **options), []
    flow.net.register_forward_hook(lambda net, given, out: seen.append((len(out), out.requires_grad)))
    terms_of(flow)
    assert sum(size for size, _ in seen) == rows
    assert [size for size, grad in seen if grad] == [16]


def test_blocks_have_their_times():
    flow = model(unet(), shares=Shares(1.0, 1.0, 1.0, 1.0, 1.0), consistency=0.5)
    x1, _ = batch(20)
    d, rows = flow.drawn(x1, draws(20)), flow.objective.shares.rows(20)
    t, r = flow.objective.times(d, rows)
    reach = (r - t) / (1 - t)
    assert torch.equal(t[rows["e2e"]], torch.zeros(4))
    assert torch.equal(r[rows["e2e"]], torch.ones(4))
    torch.testing.assert_close(r[rows["one"]], torch.ones(4))
    assert torch.equal(t[rows["adv"]], r[rows["adv"]])
    torch.testing.assert_close(2 - t[rows["adv"]], d.t[rows["adv"]])
    torch.testing.assert_close(reach[rows["mul"]], 0.05 * d.near[rows["mul"]], rtol=0, atol=1e-5)
    torch.testing.assert_close(reach[rows["any"]], 0.5 * d.reach[rows["any"]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9, 1.0])
def test_targets_come_from_the_weights_asked_for(ema_decay):
    flow = model(unet(), ema_decay=ema_decay, enhanced_ratio=0.5)
    before = {name: weight.clone() for name, weight in flow.net.state_dict().items()}
    terms_of(flow)
    torch.testing.assert_close(dict(flow.net.state_dict()), before, rtol=0, atol=0)
    if ema_decay:
        changed(flow.net)
        own = [flow.shadow.get_buffer(name.replace(".", "/")) for name, _ in flow.net.named_parameters()]
        kept = [weight.clone() for weight in own]
        terms_of(flow)
        moved = any(not torch.equal(a, b) for a, b in zip(own, kept))
        assert moved == (ema_decay < 1)
        x, cond = batch(4)
        with untracked(), flow.shadow.shown(flow.net):
            shown = flow.net(x, torch.full((4,), 0.5), cond)
        assert not torch.equal(shown, flow.net(x, torch.full((4,), 0.5), cond))


def test_autocast_keeps_every_gradient_and_no_old_weight():
    """Weights cast for a call without gradient, or before the average was shown, must not be used again."""
    losses = {}
    for cached in (True, False):
        flow = model(unet(), ema_decay=0.9, enhanced_ratio=0.5)
        changed(flow.net)
        flow.ramp = 0.5
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            terms = terms_of(flow)
            total = terms.base.mean() + terms.rectify.mean()
        total.backward()
        losses[cached] = float(total.detach())
        assert all(weight.grad is not None for weight in flow.net.parameters())
    assert losses[True] == losses[False]


def test_low_rank_weights_alone_train_and_have_an_average():
    flow = model(unet(), ema_decay=0.9, lora_rank=2)
    trained = [name for name, weight in flow.net.named_parameters() if weight.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == len(dict(flow.shadow.named_buffers()))
    terms_of(flow).base.mean().backward()


def test_starts_from_a_flow_of_one_time():
    plain = unet()
    flow = model(unet())
    state = {f"net.{name}": weight + 1 for name, weight in plain.state_dict().items()}
    flow.net.load_state_dict(flow.initial_weights(state))
    plain.load_state_dict({name.removeprefix("net."): weight for name, weight in state.items()})
    x, cond = batch(4)
    t = torch.tensor([0.0, 0.3, 0.7, 1.0])
    torch.testing.assert_close(flow.net(x, t, cond, t), plain(x, t, cond), rtol=0, atol=1e-6)
    again = {f"net.{name}": weight for name, weight in flow.net.state_dict().items()}
    assert flow.initial_weights(again).keys() == flow.net.state_dict().keys()


def test_jump_and_samples():
    flow = model(unet())
    x, cond = batch(4)
    half, one = torch.full((4,), 0.5), torch.ones(4)
    torch.testing.assert_close(flow.jump(x, half, one, cond), x + 0.5 * flow.net(x, half, cond, one))
    with pytest.raises(ValueError, match="0 <= t <= r <= 1"):
        flow.jump(x, one, half, cond)
    first, again = (flow.sample(4, steps=s, cond=cond, generator=torch.Generator().manual_seed(0)) for s in (1, 1))
    assert torch.equal(first, again)
    assert flow.nfe == 1
    for steps in (2, 4, 8):
        flow.sample(4, steps=steps, cond=cond)
        assert flow.nfe == steps


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"order": -1}, "order=-1"),
        ({"first_step": 1.0}, r"first_step=1.0: expected a number in \[0, 1\)"),
        ({"first_step": 0.0, "order": 1}, "first_step=0: expected order=2 or more"),
        ({"consistency": 1.5}, "consistency=1.5"),
        ({"near": -0.1}, "near=-0.1"),
        ({"rectify": -1.0}, "rectify=-1.0"),
        ({"rectify": math.nan}, "rectify=nan"),
        ({"enhanced_ratio": -0.5}, "enhanced_ratio=-0.5"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha=0.0"),
        ({"enhanced_ratio": 1.0}, r"enhanced_ratio=1.0: expected below 1 .*frozen teacher"),
        ({"enhanced_range": (0.7, 0.2)}, r"enhanced_range=\[0.7, 0.2\]"),
        ({"lora_rank": -1}, "rank -1"),
    ],
)
def test_options_out_of_range(options, line):
    with pytest.raises(ValueError, match=line):
        model(unet(), **options)


def test_networks_that_cannot_be_made_any_step():
    with pytest.raises(ValueError, match="MLP has no module 'time', expected its time embedding"):
        model(MLP())
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        model(AffineFlow(), lora_rank=4)
    assert isinstance(model(unet()).net, AnyStep)


def test_predictions_belong_to_their_index():
    flow = model(unet())
    flow.predict_steps = 4
    x, cond = batch(6)
    index = torch.arange(6)
    whole = flow.predict_step({"image": x, "label": cond, "index": index}, 0)
    part = flow.predict_step({"image": x[4:], "label": cond[4:], "index": index[4:]}, 0)
    torch.testing.assert_close(whole["image"][4:], part["image"])


@pytest.mark.parametrize(
    ("options", "data", "line"),
    [
        ({}, {"batch_size": 6}, "data.batch_size: found 6, expected at least 8, 4 on each rank"),
        ({"shares": Shares(one=1.0)}, {"batch_size": 8}, "expected at least 10, 5 on each rank"),
        ({"enhanced_ratio": 0.5}, {"num_classes": 0}, "model.net.num_classes: found 4"),
        ({"shares": Shares(adv=0.0)}, {}, "model.rectify: found 0.5, expected 0"),
        ({"shares": ONLY_E2E, "rectify": 0.0, "order": 0}, {}, "model.shares: found neither mul nor adv"),
    ],
)
def test_data_that_do_not_fit(options, data, line):
    flow = model(unet(), **options)
    flow._trainer = SimpleNamespace(world_size=2)
    fit = {"shape": (1, 8, 8), "num_classes": 4, "batch_size": 8}
    with pytest.raises(UserError, match=line):
        flow.fits(SimpleNamespace(**fit | data))


def test_a_network_without_times_of_a_twin_trains_without_one():
    net = unet()
    net.twin = False
    data = SimpleNamespace(shape=(1, 8, 8), num_classes=4, batch_size=8)
    for options, fine in (({}, False), ({"shares": Shares(adv=0.0), "rectify": 0.0}, True)):
        flow = model(AnyStep(copy.deepcopy(net)), **options)
        flow._trainer = SimpleNamespace(world_size=1)
        if fine:
            flow.fits(data)
        else:
            with pytest.raises(UserError, match=r"model.net: has no times of a twin"):
                flow.fits(data)


def test_prompts_steer_it():
    torch.manual_seed(0)
    net = UNet((1, 8, 8), width=8, text_dim=32)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.1)
    flow = model(net, text=HashedText(), prompts=["a cat", "a dog"], enhanced_ratio=0.5)
    assert (flow.num_classes, flow.takes_text) == (2, True)
    x, _ = batch(4)
    index, text = torch.arange(4), ["a cat", "a dog", "a cat", "a bird"]
    terms = flow.terms(x, flow.condition({"text": text}), flow.drawn(x, draws(4)))
    assert terms.base.isfinite().all()
    assert flow.losses({"image": x, "text": text, "index": index}, draws(4)).shape == (4,)
    by_number, by_text, one = (
        flow.sample(2, generator=torch.Generator().manual_seed(0), **given)
        for given in ({"cond": torch.tensor([0, 1])}, {"cond": ["a cat", "a dog"]}, {"prompt": "a cat"})
    )
    assert torch.equal(by_number, by_text)
    assert torch.equal(by_text[0], one[0])
    assert not torch.equal(by_text[1], one[1])
    assert flow.predict_step({"text": text, "index": index}, 0)["image"].shape == (4, 1, 8, 8)
    with pytest.raises(UserError, match="the model takes no text"):
        model(unet()).sample(1, prompt="a cat")
    with pytest.raises(ValueError, match="give text, too"):
        model(unet(), prompts=["a cat"])
