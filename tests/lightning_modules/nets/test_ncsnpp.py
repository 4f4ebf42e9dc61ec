"""NCSN++: counts, structure, resampling, embeddings, initialisation."""

import math

import pytest
import torch
from torch.nn import functional as F

from penstock.lightning_modules.nets.condition import FourierEmbedding, positional_embedding
from penstock.lightning_modules.nets.ncsnpp import NCSNpp, Resample, ddpmpp_cifar10, ncsnpp_256

SMALL = {"shape": (3, 16, 16), "width": 8, "mult": (1, 2), "blocks": 1, "attention": (8,)}
FOURIER = {**SMALL, "embedding": "fourier", "fir": True, "progressive": True, "divide_by_time": True}


@pytest.mark.parametrize(
    ("build", "parameters", "frozen", "layers"),
    [(ddpmpp_cifar10, 61_804_419, 0, 53), (ncsnpp_256, 65_574_549, 128, 74)],
)
def test_published_parameter_counts(build, parameters, frozen, layers):
    with torch.device("meta"):
        net = build()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == frozen
    assert len(net.layers) == layers


def test_full_presets_run_on_the_meta_device():
    with torch.device("meta"):
        for net in (ddpmpp_cifar10(num_classes=10), ncsnpp_256()):
            x = torch.empty(2, *net.shape)
            assert net(x, torch.empty(2)).shape == x.shape


def filter_by_hand(x, direction):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    height, width = x.shape[-2:]
    if direction == "down":
        padded = F.pad(x, (1, 1, 1, 1))
        out = torch.zeros(*x.shape[:2], height // 2, width // 2, dtype=x.dtype)
        gain, stride = 1 / 64, 2
    else:
        grid = torch.zeros(*x.shape[:2], 2 * height, 2 * width, dtype=x.dtype)
        grid[..., ::2, ::2] = x
        padded = F.pad(grid, (2, 1, 2, 1))
        out = torch.zeros_like(grid)
        gain, stride = 4 / 64, 1
    for i in range(out.shape[-2]):
        for j in range(out.shape[-1]):
            window = padded[..., stride * i : stride * i + 4, stride * j : stride * j + 4]
            out[..., i, j] = gain * torch.einsum("bcij,i,j->bc", window, taps, taps)
    return out


@pytest.mark.parametrize("direction", ["up", "down"])
def test_fir_resampling_against_loops(direction):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(Resample(direction, fir=True)(x), filter_by_hand(x, direction), rtol=1e-12, atol=1e-13)


def test_plain_resampling_repeats_and_averages():
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert Resample("up", fir=False)(x)[0, 0, 0].tolist() == [0, 0, 1, 1]
    assert Resample("down", fir=False)(x).item() == 1.5


def test_positional_embedding_formula():
    t = torch.tensor([0.0, 0.999, 321.5], dtype=torch.float64)
    emb = positional_embedding(t, 8)
    for b, value in enumerate(t.tolist()):
        for i in range(4):
            angle = value * math.exp(-i * math.log(10000) / 3)
            assert emb[b, i].item() == pytest.approx(math.sin(angle), abs=1e-13)
            assert emb[b, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-13)
    with pytest.raises(ValueError, match="even size of at least 4, got 7"):
        positional_embedding(t, 7)


def test_fourier_embedding_is_frozen_and_scaled():
    embedding = FourierEmbedding(4096, scale=16.0)
    assert not embedding.weight.requires_grad
    assert embedding.weight.std().item() == pytest.approx(16.0, rel=0.05)
    s = torch.tensor([0.3])
    torch.testing.assert_close(embedding(s)[0, 5], torch.sin(2 * math.pi * 0.3 * embedding.weight[5]))


@pytest.mark.parametrize("options", [SMALL, FOURIER])
def test_initial_output_is_almost_zero(options):
    torch.manual_seed(0)
    net = NCSNpp(**options)
    x = torch.randn(4, 3, 16, 16)
    out = net(x, torch.tensor([0.01, 0.3, 0.6, 1.0]))
    assert 0 < out.abs().max() < 1e-3


def test_initial_weights_have_the_stated_variance():
    torch.manual_seed(0)
    net = NCSNpp(width=64, blocks=1, mult=(1,), shape=(3, 16, 16))
    block = next(layer for layer in net.layers if hasattr(layer, "conv0"))
    fan = 64 * 9
    assert block.conv0.weight.var().item() == pytest.approx(1 / fan, rel=0.05)
    assert block.conv1.weight.var().item() == pytest.approx(1e-10 / fan, rel=0.05)
    attention = next(layer for layer in net.layers if hasattr(layer, "query"))
    assert attention.query.weight.var().item() == pytest.approx(0.1 / 64, rel=0.1)
    assert all(p.abs().max() == 0 for name, p in net.named_parameters() if name.endswith("bias") and p.std() == 0)


def randomise(net):
    torch.manual_seed(1)
    for p in net.parameters():
        p.data = torch.randn_like(p) / max(p[0].numel(), 1) ** 0.5 if p.requires_grad else 4 * torch.randn_like(p)
    return net


def test_not_centred_maps_the_input():
    centred, other = (randomise(NCSNpp(**SMALL, centred=c)) for c in (True, False))
    x, t = torch.rand(2, 3, 16, 16), torch.tensor([0.2, 0.8])
    torch.testing.assert_close(other(x, t), centred(2 * x - 1, t))


def test_divide_by_time_divides_by_999_t():
    plain, divided = (randomise(NCSNpp(**{**FOURIER, "divide_by_time": d})) for d in (False, True))
    x, t = torch.rand(2, 3, 16, 16), torch.tensor([0.2, 0.8])
    torch.testing.assert_close(divided(x, t) * (999 * t)[:, None, None, None], plain(x, t))


@pytest.mark.parametrize("options", [SMALL, FOURIER])
def test_bfloat16_and_autocast_stay_near_float32(options):
    net = randomise(NCSNpp(**options))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.9])
    exact = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, t)
    assert (mixed - exact).norm() < 0.05 * exact.norm()
    assert net.bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16


def test_gradient_through_the_network_in_float64():
    net = randomise(NCSNpp(**{**FOURIER, "shape": (1, 4, 4), "width": 4, "attention": ()})).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: net(x, t), (x,), fast_mode=True)


def test_class_changes_the_output_and_null_class_is_no_class():
    net = randomise(NCSNpp(**SMALL, num_classes=3))
    x, t, cond = torch.randn(3, 3, 16, 16), torch.full((3,), 0.5), torch.tensor([0, 1, 2])
    assert not torch.allclose(net(x, t, cond), net(x, t))
    dropped = net.drop_condition(cond, torch.tensor([True, False, True]))
    assert dropped.tolist() == [3, 1, 3]
    torch.testing.assert_close(net(x, t, net.drop_condition(cond, torch.ones(3, dtype=torch.bool))), net(x, t))


def test_dropout_acts_in_training_only():
    net = randomise(NCSNpp(**SMALL, dropout=0.5))
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


def test_errors_are_clear():
    with pytest.raises(ValueError, match=r"multiples of 8 \(4 levels\), got 30x32"):
        NCSNpp(shape=(3, 30, 32))
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, got 6"):
        NCSNpp(width=6)
    net = NCSNpp(**SMALL)
    with pytest.raises(ValueError, match=r"samples of shape \(3, 16, 16\), got \(3, 8, 8\)"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    with pytest.raises(ValueError, match=r"times of shape \(1,\), got \(2,\)"):
        net(torch.zeros(1, 3, 16, 16), torch.zeros(2))
    with pytest.raises(ValueError, match="unconditional"):
        net(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
