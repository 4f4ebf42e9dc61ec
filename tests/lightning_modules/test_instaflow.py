"""InstaFlow: official sampler, guidance, reflow and distillation of closed forms, the embedded prompt encoder."""

import re
from functools import partial

import pytest
import torch
from torch import nn

from penstock.datamodules.image_text import ImageText
from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.losses import FlowLoss, SquaredError
from penstock.lightning_modules.flow.solvers import Heun
from penstock.lightning_modules.flow.times import Fixed
from penstock.lightning_modules.instaflow import InstaFlow
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.text_encoder import HashedText
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.rectified_flow import RectifiedFlow

ADAM = partial(torch.optim.Adam, lr=1e-3)
SHAPE = (1, 2, 2)


class Linearly(nn.Module):
    """`v = x + mean of the prompt's features`, and a record of times and batch sizes."""

    shape, num_classes = SHAPE, 0

    def __init__(self):
        super().__init__()
        self.asked = []

    def drop_condition(self, cond, mask):
        return torch.where(mask[:, None, None], 0.0, cond)

    def forward(self, x, t, cond=None):
        self.asked.append((len(x), float(t[0])))
        return x + (0 if cond is None else cond.mean((1, 2)).view(-1, 1, 1, 1))


class Doubled(Autoencoder):
    """A latent space in which everything is half as large."""

    key = "latent"

    def latent_shape(self, shape):
        return shape

    def encode(self, image, noise=None):
        return image / 2

    def decode(self, latent):
        return latent * 2


class TwoPrompts(nn.Module):
    """The exact velocity of noise to `X1 | T ~ N(m_T, s^2)`, prompt 1 at +1 and prompt 0 at -1; or of its pairs."""

    shape, num_classes, s = SHAPE, 0, 0.3

    def __init__(self, coupled=False):
        super().__init__()
        self.coupled = coupled

    def drop_condition(self, cond, mask):
        return cond

    def forward(self, x, t, cond=None):
        m, t = cond[:, 0, 0].view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        if self.coupled:
            x0 = (x - t * m) / (1 - t + t * self.s)
            return m + (self.s - 1) * x0
        variance = t**2 * self.s**2 + (1 - t) ** 2
        return m + (t * self.s**2 - (1 - t)) / variance * (x - t * m)


def signs(prompts):
    return torch.tensor([1.0 if p == "one" else -1.0 for p in prompts]).view(-1, 1, 1)


def flow(net=None, **options):
    return InstaFlow(net or Linearly(), ADAM, **options)


def noise(n, seed=0):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_one_step_is_x0_plus_v_at_time_0():
    model = flow()
    cond = model.features(["a cat", "two dogs"])
    x = model.sample(2, steps=1, cond=["a cat", "two dogs"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, noise(2) + model.net(noise(2), torch.zeros(2), cond))
    assert model.nfe == 1


def test_four_steps_ask_at_0_a_quarter_a_half_and_three_quarters():
    model = flow()
    model.sample(2, steps=4, cond=["a", "b"])
    assert [t for _, t in model.net.asked] == [0.0, 0.25, 0.5, 0.75]
    assert [1000 * (1 - t) for _, t in model.net.asked] == [1000, 750, 500, 250]


def test_guidance_acts_above_one_only_and_is_linear():
    model = flow()
    sample = partial(model.sample, 3, steps=1, cond=["a cat"] * 3)

    def at(scale, **options):
        return sample(guidance=scale, generator=torch.Generator().manual_seed(0), **options)

    text = at(1.0)
    assert torch.equal(at(0.0), text)
    assert model.net.asked[-1][0] == 3
    two, three = at(2.0), at(3.0)
    assert model.net.asked[-1][0] == 6
    assert model.nfe == 2
    null = 2 * noise(3)
    torch.testing.assert_close(two, null + 2 * (text - null))
    torch.testing.assert_close(three - two, two - text)
    torch.testing.assert_close(at(2.0, negative="a cat"), text)
    assert not torch.equal(at(2.0, negative="a dog"), two)


def test_prompts_come_as_text_numbers_or_features():
    model = flow(prompts=["a cat", "a dog"])
    made = [
        model.sample(2, steps=1, cond=cond, generator=torch.Generator().manual_seed(0))
        for cond in (["a dog", "a cat"], torch.tensor([1, 0]), model.prompted.text(["a dog", "a cat"]))
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    one = model.sample(2, steps=1, prompt="a dog", generator=torch.Generator().manual_seed(0))
    assert torch.equal(one[0], made[0][0])
    assert model.num_classes == 2
    with pytest.raises(UserError, match="3 prompts given for 2 samples"):
        model.sample(2, steps=1, cond=["a", "b", "c"])
    with pytest.raises(UserError, match=r"model\.prompts: found none"):
        flow().sample(2, steps=1, cond=torch.tensor([1, 0]))


def test_one_step_before_reflow_lands_on_the_mean_and_after_it_on_the_sample():
    model = flow(TwoPrompts())
    model.prompted.text = lambda texts, device="cpu": signs(texts)
    mean = signs(["one", "zero"]).view(2, 1, 1, 1)
    x0 = noise(2)
    torch.testing.assert_close(model.integrate(x0, 1, cond=["one", "zero"]).x, mean.expand_as(x0))
    pairs = model.integrate(x0, 200, cond=["one", "zero"], solver=Heun()).x
    torch.testing.assert_close(pairs, mean + 0.3 * x0, atol=1e-3, rtol=0)
    straight = flow(TwoPrompts(coupled=True))
    straight.prompted.text = model.prompted.text
    batch = {"source": x0, "image": mean + 0.3 * x0, "text": ["one", "zero"], "index": torch.arange(2)}
    assert straight.losses(batch, Draws(0, 0, batch["index"])).max() < 1e-10
    torch.testing.assert_close(straight.integrate(x0, 1, cond=["one", "zero"]).x, mean + 0.3 * x0)


class MLP(nn.Module):
    shape, num_classes = (1, 1, 2), 0

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def drop_condition(self, cond, mask):
        return cond

    def forward(self, x, t, cond=None):
        features = torch.cat([x.flatten(1), t[:, None], cond[:, 0, :1]], 1)
        return self.layers(features).view_as(x)


@pytest.mark.slow
def test_a_student_of_the_reflow_is_closer_to_its_teacher_than_one_of_the_first_flow():
    generator = torch.Generator().manual_seed(0)

    def fit(model, steps, batch_of):
        optimizer = torch.optim.Adam(model.net.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            optimizer.zero_grad()
            batch = batch_of() | {"index": torch.arange(256)}
            model.losses(batch, Draws(0, step, batch["index"])).mean().backward()
            optimizer.step()
            schedule.step()
        return model

    def make(seed, start=None, **options):
        model = InstaFlow(MLP(seed), ADAM, **options)
        model.prompted.text = lambda texts, device="cpu": torch.zeros(len(texts), 1, 1)
        if start is not None:
            model.net.load_state_dict(start.net.state_dict())
        return model

    def data():
        angle = torch.randint(6, (256,), generator=generator) * torch.pi / 3
        x1 = 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(256, 2, generator=generator)
        return {"image": x1.view(-1, 1, 1, 2), "text": [""] * 256}

    def pairs(teacher):
        x0 = torch.randn(256, 1, 1, 2, generator=generator)
        with torch.no_grad():
            x1 = teacher.integrate(x0, 12, cond=[""] * 256, solver=Heun()).x
        return {"source": x0, "image": x1, "text": [""] * 256}

    def error(student, teacher):
        batch = pairs(teacher)
        with torch.no_grad():
            made = student.integrate(batch["source"], 1, cond=batch["text"]).x
        return float((made - batch["image"]).square().mean())

    first = fit(make(1), 1000, data)
    second = fit(make(2, first), 600, lambda: pairs(first))
    of_first = fit(make(3, first, times=Fixed(0.0)), 400, lambda: pairs(first))
    of_second = fit(make(3, second, times=Fixed(0.0)), 400, lambda: pairs(second))
    assert error(of_second, second) < 0.5 * error(of_first, first)


def test_on_fresh_noise_it_is_the_rectified_flow():
    torch.manual_seed(0)
    net = UNet(text_dim=32)
    nn.init.normal_(net.head.weight)
    model = InstaFlow(net, ADAM)
    batch = {"image": torch.rand(4, 1, 8, 8), "text": ["a", "b", "c", "d"], "index": torch.arange(4)}
    plain = RectifiedFlow(net, ADAM, condition_dropout=0.0, times=model.times)
    plain.condition = model.condition
    draws = Draws(3, 1, batch["index"])
    torch.testing.assert_close(model.losses(batch, draws), plain.losses(batch, Draws(3, 1, batch["index"])))


def test_distillation_sees_the_noise_alone():
    model = flow(times=Fixed(0.0))
    batch = {"source": noise(3), "image": noise(3, 1), "text": ["a", "b", "c"], "index": torch.arange(3)}
    losses = model.losses(batch, Draws(0, 0, batch["index"]))
    assert model.net.asked[-1][1] == 0.0
    made = model.integrate(batch["source"], 1, cond=batch["text"]).x
    torch.testing.assert_close(losses, (made - batch["image"]).square().flatten(1).mean(1))


class Compares(FlowLoss):
    def __call__(self, r):
        self.regression = r
        return SquaredError()(r)


def test_a_loss_of_images_compares_decoded_ones():
    loss = Compares()
    model = flow(autoencoder=Doubled(), times=Fixed(0.0), loss=loss, space="image")
    batch = {"source": noise(3), "latent": noise(3, 1), "text": ["a", "b", "c"], "index": torch.arange(3)}
    model.losses(batch, Draws(0, 0, batch["index"]))
    made = model.integrate(batch["source"], 1, cond=batch["text"]).x
    r = loss.regression
    torch.testing.assert_close(r.x0 + r.prediction, 2 * made)
    assert torch.equal(r.x1, 2 * batch["latent"])
    assert torch.equal(r.target, r.x1)


def test_latents_are_encoded_on_the_way_in_and_decoded_on_the_way_out():
    model = flow(autoencoder=Doubled())
    assert model.key == "latent"
    batch = {"image": noise(3), "text": ["a", "b", "c"], "index": torch.arange(3)}
    direct = {"latent": noise(3) / 2, "text": batch["text"], "index": batch["index"]}
    assert torch.equal(
        model.losses(batch, Draws(0, 0, batch["index"])), model.losses(direct, Draws(0, 0, batch["index"]))
    )
    x = model.sample(2, steps=1, cond=["a", "b"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, 2 * model.integrate(noise(2), 1, cond=["a", "b"]).x)


def test_noise_comes_back_when_a_flow_of_many_steps_is_run_backwards():
    model = flow(TwoPrompts(coupled=True))
    model.prompted.text = lambda texts, device="cpu": signs(texts)
    x0 = noise(2)
    there = model.integrate(x0, 50, cond=["one", "zero"], solver=Heun()).x
    back = model.integrate(there, 50, cond=["one", "zero"], solver=Heun(), reverse=True).x
    torch.testing.assert_close(back, x0, atol=1e-2, rtol=0)


def test_prompt_features_are_fixed_words_at_places():
    text = HashedText(dim=64, length=4)
    features = text(["A cat.", "a cat", "cat a", "", "one two three four five"])
    assert features.shape == (5, 4, 64)
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[1].mean(0), features[2].mean(0)[:1].expand(64))
    assert not features[1, 2:].any()
    assert not features[3].any()
    assert torch.equal(features[4], text(["one two three four"])[0])
    assert not torch.equal(features, HashedText(dim=64, length=4, seed=1)(["a"] * 5))
    words = HashedText(dim=512, length=1)([f"word{n}" for n in range(200)])[:, 0]
    assert float(words.std()) == pytest.approx(1.25**0.5, abs=0.05)
    torch.testing.assert_close(HashedText(dim=4, length=1)(["a"]), HashedText(dim=4, length=1)(["a"]))


def test_batches_and_data_that_do_not_fit_are_named():
    data = ImageText()
    data.setup()
    flow(UNet(text_dim=32)).fits(data)
    with pytest.raises(UserError, match=r"model\.net\.shape: found \(1, 2, 2\), expected \(1, 8, 8\)"):
        flow().fits(data)
    with pytest.raises(UserError, match=r"model\.text: features of 32 numbers do not fit model\.net: .*\(B, L, 16\)"):
        flow(UNet(text_dim=16)).fits(data)
    with pytest.raises(UserError, match=r"model\.text: .* set num_classes or text_dim"):
        flow(UNet()).fits(data)
    with pytest.raises(UserError, match=re.escape("batches have image, index; expected text")):
        flow().condition({"image": None, "index": None})
    with pytest.raises(ValueError, match="condition_dropout=2"):
        flow(condition_dropout=2)
