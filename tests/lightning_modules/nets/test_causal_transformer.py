"""Attention against plain formulas: causal masks, chunks against a cache, grouped queries, temperatures; the norm."""

import pytest
import torch

from penstock.lightning_modules.nets.causal_transformer import Attention, Cache, RMSNorm, gemma_layer, plain_layer
from penstock.lightning_modules.nets.rotary import Rotary

DIM, HEAD, TOKENS = 48, 24, 7


def tokens(number=TOKENS, seed=0):
    return torch.randn(2, number, DIM, generator=torch.Generator().manual_seed(seed)).double()


def turn(number=TOKENS, axes=2):
    angles = Rotary(HEAD, axes).angles((1, 1, number), dtype=torch.float64)
    return angles.cos(), angles.sin()


def attention(**options):
    torch.manual_seed(0)
    return Attention(DIM, HEAD, **options).double()


def by_hand(net, x, mask, temperature=1.0):
    """Softmax of scaled products, no rotation, as many heads of keys as of queries."""
    q, k, v = net.qkv(net.norm(x)).unflatten(-1, (3, 2, HEAD)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.mT / HEAD**0.5 / temperature).masked_fill(~mask, -torch.inf)
    return net.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_causal_attention():
    net, x, causal = attention(), tokens(), torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    torch.testing.assert_close(net(x), by_hand(net, x, causal))


def test_a_mask_takes_the_place_of_the_causal_one():
    net, x, mask = attention(), tokens(), torch.eye(TOKENS, dtype=torch.bool).roll(2, 1)
    torch.testing.assert_close(net(x, mask=mask), by_hand(net, x, mask))
    net.causal = False
    torch.testing.assert_close(net(x), by_hand(net, x, torch.ones_like(mask)))


def test_temperature_of_a_sample():
    net, x, causal = attention(), tokens(), torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    temperature = torch.tensor([1.0, 1.7])[:, None, None, None].double()
    torch.testing.assert_close(net(x, temperature=temperature), by_hand(net, x, causal, temperature))


def test_grouped_queries_are_repeated_keys_and_values():
    grouped, full = attention(heads=4, kv_heads=2), attention(heads=4, kv_heads=4)
    full.load_state_dict({k: v for k, v in grouped.state_dict().items() if "qkv" not in k}, strict=False)
    q, k, v = grouped.qkv.weight.detach().split(grouped.sizes)
    k, v = (part.unflatten(0, (2, HEAD)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))
    qb, kb, vb = grouped.qkv.bias.detach().split(grouped.sizes)
    kb, vb = (part.unflatten(0, (2, HEAD)).repeat_interleave(2, 0).flatten() for part in (kb, vb))
    full.qkv.load_state_dict({"weight": torch.cat([q, k, v]), "bias": torch.cat([qb, kb, vb])})
    torch.testing.assert_close(grouped(tokens(), turn()), full(tokens(), turn()))


LAYERS = {
    "plain": lambda: plain_layer(DIM, HEAD),
    "gemma": lambda: gemma_layer(DIM, HEAD, 4, 2, qk_norm=True),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 4], [4, 1, 2]])
def test_chunks_against_a_cache_are_one_pass(make, chunks):
    torch.manual_seed(0)
    layers, x, angles = [make().double() for _ in range(2)], tokens(), turn()
    cache = Cache(2, 2, layers[0].attention.kv_heads, TOKENS, HEAD, dtype=torch.float64)

    def run(x, cache=None):
        for i, layer in enumerate(layers):
            x = layer(x, angles, cache=cache, layer=i)
        return x

    found = []
    for chunk in x.split(chunks, 1):
        found.append(run(chunk, cache))
        cache.start += chunk.shape[1]
    torch.testing.assert_close(torch.cat(found, 1), run(x))
    cache.start = 2
    torch.testing.assert_close(run(x[:, 2:5], cache), run(x)[:, 2:5])


def test_the_cache_holds_rotated_keys():
    net, x = attention(), tokens()
    cache = Cache(1, 2, 2, TOKENS, HEAD, dtype=torch.float64)
    net(x, turn(), cache=cache)
    keys, values = net.qkv(net.norm(x)).unflatten(-1, (3, 2, HEAD)).permute(2, 0, 3, 1, 4)[1:]
    pairs = torch.view_as_complex(keys.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(*turn())
    torch.testing.assert_close(cache.keys[0], torch.view_as_real(pairs).flatten(-2))
    torch.testing.assert_close(cache.values[0], values)


def test_a_cache_of_half_precision():
    net, x = attention().float(), tokens().float()
    cache = Cache(1, 2, 2, TOKENS, HEAD, dtype=torch.bfloat16)
    found = net(x, cache=cache)
    assert cache.keys.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert 0 < (found - net(x)).abs().max() < 1e-2


def test_a_cache_that_is_too_short():
    cache = Cache(1, 2, 2, TOKENS - 1, HEAD, dtype=torch.float64)
    with pytest.raises(ValueError, match="Cache: 7 tokens, expected at most 6"):
        attention()(tokens(), cache=cache)


def test_a_cache_and_a_mask():
    cache = Cache(1, 2, 2, TOKENS, HEAD, dtype=torch.float64)
    with pytest.raises(ValueError, match="a cache is for causal attention without a mask"):
        attention()(tokens(), mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool), cache=cache)


def test_a_width_that_heads_do_not_share():
    with pytest.raises(ValueError, match="width 48, expected a multiple of 32"):
        Attention(DIM, 32)
    assert Attention(DIM, 32, heads=2)(tokens().float()).shape == (2, TOKENS, DIM)


def test_rms_norm_gains_one_more_than_its_weight_in_full_precision():
    net = RMSNorm(DIM)
    x = 3 * tokens().float()
    torch.testing.assert_close(net(x).square().mean(-1), torch.ones(2, TOKENS))
    torch.nn.init.constant_(net.weight, 0.003)
    half = RMSNorm(DIM).bfloat16()
    torch.nn.init.constant_(half.weight, 0.003)
    assert half(x).dtype == torch.float32
    torch.testing.assert_close(half(x), net(x), rtol=1e-4, atol=0)
