"""Transformers of diffusers with random weights: their own convention, the second time, and a step of TwinFlow."""

import inspect
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", minversion="0.37", reason="diffusers is not installed (extra text2image)")

from penstock.kernels.philox import Draws
from penstock.lightning_modules.nets import any_step_hosts as hosts
from penstock.lightning_modules.nets import lora
from penstock.lightning_modules.nets.any_step import AnyStep, HalfTime
from penstock.lightning_modules.nets.prompt_features import split_mask, split_pooled, with_mask, with_pooled
from penstock.lightning_modules.twinflow import TwinFlow

TINY = runpy.run_path(str(Path(__file__).parents[1] / "weights" / "diffusers_hosts.py"))
TRAINABLE = ("StableDiffusion3", "Sana", "QwenImage")
NAMES = (*TRAINABLE, "ZImage")
SHAPE = (4, 8, 8)


def packed(name, rows, seed=0):
    pack = with_pooled if name == "StableDiffusion3" else with_mask
    return pack(*TINY["features"](name, rows, seed))


def host(name, **options):
    null = packed(name, 2, seed=1)[1]
    return getattr(hosts, name)(TINY["transformer"](name), SHAPE, null, **options).eval()


@pytest.fixture
def x():
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))


def own_convention(name, net, x, s, tokens, other):
    """The untouched transformer at its own time `s`, 1 noise and 0 data (Z-Image: 0 and 1), and its own output."""
    if name == "StableDiffusion3":
        return net(x, tokens, other, 1000 * s).sample
    if name == "Sana":
        return net(x, tokens, 1000 * s, encoder_attention_mask=other).sample
    if name == "ZImage":
        texts = [row[: int(mask.sum())] for row, mask in zip(tokens, other)]
        return torch.stack(net(list(x.unsqueeze(2)), s, texts).sample).squeeze(2)
    patches = x.reshape(3, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 16)
    sizes = [[(1, 4, 4)]] * 3
    found = net(patches, tokens, other, s, sizes).sample
    return found.reshape(3, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 4, 8, 8)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_at_r_equal_to_t_it_is_the_untouched_transformer(name, x):
    t = torch.tensor([0.0, 0.35, 0.9])
    tokens, other = TINY["features"](name, 3)
    sign, s = (1, t) if name == "ZImage" else (-1, 1 - t)
    expected = sign * own_convention(name, TINY["transformer"](name).eval(), x, s, tokens, other)
    net, cond = AnyStep(host(name)), packed(name, 3)
    for found in (net(x, t, cond, t), net(x, t, cond), host(name)(x, t, cond)):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert expected.std() > 0.1
    assert (net.shape, net.num_classes, net.twin) == (SHAPE, 0, name != "ZImage")
    assert (net(x, t, cond, t + 0.1) - expected).abs().amax() > 1e-4


@pytest.mark.parametrize("name", TRAINABLE)
def test_both_embeddings_are_asked_in_the_transformers_clock(name, x):
    net, seen = AnyStep(host(name)), {}
    second_time = net.net.get_submodule(net.place)
    for which in ("first", "second"):
        getattr(second_time, which).register_forward_pre_hook(
            lambda module, args, kwargs, which=which: seen.update({which: (args or [kwargs["timestep"]])[0]}),
            with_kwargs=True,
        )
    scale = 1 if name == "QwenImage" else 1000
    t, r = torch.tensor([0.25, 1.75, 2.0]), torch.tensor([0.75, 1.75, 2.0])
    out = net(x, t, packed(name, 3), r)
    torch.testing.assert_close(seen["first"], scale * torch.tensor([0.75, -0.75, -1.0]))
    torch.testing.assert_close(seen["second"], scale * torch.tensor([0.25, -0.75, -1.0]))
    data = net(x, 2 - t, packed(name, 3))
    assert ((out - data).abs().amax((1, 2, 3))[:2] > 1e-3).all()
    out.square().mean().backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in net.parameters())
    for part in (second_time.first, second_time.second):
        grads = [weight.grad for weight in part.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        assert any(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize(("name", "copied"), [(name, name not in ("StableDiffusion3", "Sana")) for name in NAMES])
def test_the_second_embedding_begins_as_the_released_one(name, copied):
    net = AnyStep(host(name))
    second_time = net.net.get_submodule(net.place)
    pairs = [(own, other) for own, other in zip(second_time.first.modules(), second_time.second.modules())]
    linear = [(own, other) for own, other in pairs if isinstance(own, nn.Linear)]
    assert linear
    assert all(torch.equal(own.weight, other.weight) == copied for own, other in linear)
    if not copied:
        weights = torch.cat([other.weight.detach().flatten() for _, other in linear])
        assert weights.std() == pytest.approx(0.02, rel=0.05)
        assert all(not other.bias.any() for _, other in linear)


@torch.no_grad()
def test_z_image_asks_the_second_embedding_at_the_way_and_cannot_tell_the_twin(x):
    t, r = torch.tensor([0.0, 0.25, 1.75]), torch.tensor([1.0, 0.75, 1.75])
    released, exact = host("ZImage"), host("ZImage", released_end=False)
    where, weight = released.second_time(t, r)
    assert where.tolist() == [0, 500, 0]
    assert weight.tolist() == [0, 0.5, 0]
    assert [part.tolist() for part in exact.second_time(t, r)] == [[1000, 500, 0], [1, 0.5, 0]]
    assert [part.tolist() for part in released.second_time(r[:1], r[:1])] == [[0], [0]]
    cond = packed("ZImage", 3)
    torch.testing.assert_close(released(x, t, cond), released(x, 2 - t, cond), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="ZImage: no token in the prompt of row 1"):
        released(x, t, cond * torch.tensor([1.0, 0.0, 1.0])[:, None, None])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dropped_prompts_are_the_empty_one_and_padding_does_not_count(name, x):
    net, cond, t = host(name), packed(name, 3), torch.tensor([0.1, 0.5, 0.7])
    dropped = net.drop_condition(cond, torch.tensor([True, False, True]))
    assert torch.equal(dropped[1], cond[1])
    made, empty = net(x, t, dropped), net(x, t)
    torch.testing.assert_close(made[::2], empty[::2], atol=1e-6, rtol=0)
    assert not torch.allclose(made[1], empty[1], atol=1e-4)
    if name != "StableDiffusion3":
        tokens, mask = split_mask(cond)
        noise = torch.where(mask[..., None], tokens, torch.randn_like(tokens))
        torch.testing.assert_close(net(x, t, with_mask(noise, mask)), net(x, t, cond), atol=1e-6, rtol=0)
        assert len(net.null_text) == 2
        with pytest.raises(ValueError, match="features of 1 tokens, expected 2, those of the empty prompt"):
            net.drop_condition(cond[:, :1], torch.ones(3, dtype=torch.bool))


def test_features_are_packed_and_unpacked():
    tokens, pooled = TINY["features"]("StableDiffusion3", 3)
    cond = with_pooled(tokens, pooled)
    assert cond.shape == (3, 5, 20)
    assert all(torch.equal(*pair) for pair in zip(split_pooled(cond, 12, 20), (tokens, pooled)))
    mask = torch.ones(3, 4).bool().tril()
    assert all(torch.equal(*pair) for pair in zip(split_mask(with_mask(tokens, mask)), (tokens, mask)))


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_of_twinflow(name, rank):
    net = HalfTime(host(name)) if rank else AnyStep(host(name))
    options = {"enhanced_ratio": 0.8, "ema_decay": 0.5, "lora_rank": rank}
    model = TwinFlow(net.train(), partial(torch.optim.SGD, lr=0.1), **options)
    x1 = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(5))
    terms = model.terms(x1, packed(name, 8), model.drawn(x1, Draws(0, 0, torch.arange(8))))
    loss = terms.base.mean() + terms.rectify.mean()
    assert loss.isfinite()
    loss.backward()
    grads = {key: weight.grad for key, weight in net.named_parameters() if weight.requires_grad}
    moved = {key for key, grad in grads.items() if grad is not None and grad.abs().sum() > 0}
    assert all(grads[key].isfinite().all() for key in moved)
    assert any(("lora_B" if rank else ".second.") in key for key in moved)
    if rank:
        lora.merge(net)
        assert net(x1, torch.rand(8), packed(name, 8), torch.ones(8)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_weights_take_and_give_the_callers(name, x):
    net = AnyStep(host(name)).to(torch.bfloat16)
    t = torch.tensor([0.1, 0.5, 0.7])
    out = net(x, t, packed(name, 3), t + 0.2)
    assert (out.dtype, out.shape) == (torch.float32, x.shape)


def test_what_does_not_fit_is_one_line(x):
    make, sd3 = TINY["transformer"], host("StableDiffusion3")
    t = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"Sana: expected float prompt features \(B, L, 13\), got float32 \(3, 4, 12\)"
    ):
        host("Sana")(x, t, packed("Sana", 3)[..., :-1])
    with pytest.raises(ValueError, match="StableDiffusion3: features of 3 tokens, expected 5, those of the empty"):
        sd3.drop_condition(packed("StableDiffusion3", 3)[:, :3], torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected samples of shape \(4, 8, 8\), got \(4, 8, 6\)"):
        sd3(x[..., :6], t, packed("StableDiffusion3", 3))
    with pytest.raises(ValueError, match="QwenImage: its transformer has no size of its own, expected a shape"):
        hosts.QwenImage(make("QwenImage"))
    assert hosts.Sana(make("Sana")).shape == SHAPE
    with pytest.raises(ValueError, match=r"multiples of 2 \(patches of QwenImage\), got 8x7"):
        hosts.QwenImage(make("QwenImage"), (4, 8, 7))
    with pytest.raises(ValueError, match="ZImage: latents of 3 channels, expected 4"):
        hosts.ZImage(make("ZImage"), (3, 8, 8))
    with pytest.raises(ValueError, match="Sana: no features of the empty prompt, expected null_text"):
        hosts.Sana(make("Sana"))(x, t)
    _, config = TINY["HOSTS"]["Sana"]
    guided = type(make("Sana"))(**config, guidance_embeds=True)
    with pytest.raises(ValueError, match="Sana: a transformer with guidance_embeds needs inputs that flows don't have"):
        hosts.Sana(guided)


def test_the_seam_of_a_method_is_the_r_of_its_network():
    assert "r" not in inspect.signature(host("Sana").forward).parameters
    assert "r" in inspect.signature(AnyStep(host("Sana")).forward).parameters
