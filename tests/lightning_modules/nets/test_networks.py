"""The contract every network keeps, and what is particular to U-Net, DiT and MLP."""

import math
from functools import partial

import jsonargparse
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from penstock.lightning_modules.nets.condition import CrossAttention, FourierEmbedding, attend, positional_embedding
from penstock.lightning_modules.nets.dit import DiT, dit, grid_embedding
from penstock.lightning_modules.nets.mlp import MLP
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.nets.unet import UNet


def randomise(net):
    torch.manual_seed(1)
    for p in net.parameters():
        p.data = torch.randn_like(p) * (0.5 / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.1)
    return net


CLASS_NETS = {
    "unet": lambda: UNet(width=8, blocks=1, num_classes=3),
    "unet32": lambda: UNet(shape=(3, 32, 32), width=8, mult=(1, 2, 2), blocks=1, attention=(16,), num_classes=3),
    "unet_rectangle": lambda: UNet(shape=(2, 8, 12), width=8, blocks=1, attention=(8, 4), num_classes=3),
    "ncsnpp": lambda: NCSNpp(shape=(1, 8, 8), width=8, mult=(1, 2), blocks=1, num_classes=3),
    "dit": lambda: DiT((1, 8, 8), 2, 32, 2, 4, num_classes=3),
    "dit_rectangle": lambda: DiT((2, 8, 12), 2, 32, 1, 4, num_classes=3),
    "mlp": lambda: MLP(num_classes=3),
    "mlp_fourier": lambda: MLP((5,), 64, 5, "silu", fourier=8, num_classes=3),
}
TEXT_NETS = {
    "unet": lambda: UNet(width=8, blocks=1, attention=(8,), text_dim=6),
    "dit": lambda: DiT((1, 8, 8), 2, 32, 2, 4, text_dim=6),
}


@pytest.mark.parametrize("name", CLASS_NETS)
def test_contract_of_class_conditional_networks(name):
    net = randomise(CLASS_NETS[name]())
    x, t, cond = torch.randn(4, *net.shape), torch.rand(4), torch.tensor([0, 1, 2, 0])
    out = net(x, t, cond)
    assert net.num_classes == 3
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, t, torch.tensor([1, 1, 2, 0])), atol=1e-4)
    assert not torch.allclose(out, net(x, t.flip(0), cond), atol=1e-4)
    torch.testing.assert_close(net(x[1:2], t[1:2], cond[1:2]), out[1:2], rtol=1e-4, atol=1e-5)
    everything, nothing = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(net(x, t, net.drop_condition(cond, everything)), net(x, t))
    assert torch.equal(net.drop_condition(cond, nothing), cond)
    with pytest.raises(ValueError, match="int64 class labels"):
        net(x, t, torch.rand(4, 2, 6))


@pytest.mark.parametrize("name", TEXT_NETS)
def test_contract_of_text_conditional_networks(name):
    net = randomise(TEXT_NETS[name]())
    x, t, text = torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, 5, 6)
    out = net(x, t, text)
    other = text.clone()
    other[0, 3] += 1
    changed = net(x, t, other)
    assert not torch.allclose(changed[0], out[0], atol=1e-4)
    torch.testing.assert_close(changed[1], out[1])
    mask = torch.tensor([True, False])
    dropped = net(x, t, net.drop_condition(text, mask))
    torch.testing.assert_close(dropped[1], out[1])
    torch.testing.assert_close(dropped[0], net(x, t)[0])
    with pytest.raises(ValueError, match=r"text features \(B, L, 6\), got .* \(2, 5, 7\)"):
        net(x, t, torch.rand(2, 5, 7))


def test_text_acts_through_cross_attention_too():
    net = randomise(UNet(width=8, blocks=1, text_dim=6))
    x, t, text = torch.randn(1, 1, 8, 8), torch.rand(1), torch.randn(1, 5, 6)
    same_mean = (text + text.mean(1, keepdim=True)) / 2
    assert not torch.allclose(net(x, t, text), net(x, t, same_mean), atol=1e-5)
    torch.testing.assert_close(net(x, t, text), net(x, t, text[:, [4, 2, 0, 1, 3]]))


@pytest.mark.parametrize("name", [n for n in CLASS_NETS if n.startswith(("unet", "dit"))])
def test_initial_output_is_zero(name):
    net = CLASS_NETS[name]()
    assert net(torch.randn(2, *net.shape), torch.rand(2), torch.tensor([0, 1])).abs().max() == 0


@pytest.mark.parametrize("name", CLASS_NETS)
def test_every_trainable_parameter_gets_a_gradient(name):
    net = randomise(CLASS_NETS[name]())
    x, t = torch.randn(4, *net.shape), torch.rand(4)
    net(x, t, torch.arange(4) % 4).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or p.grad.norm() == 0)] == []


@pytest.mark.parametrize("name", CLASS_NETS)
def test_networks_work_in_other_precisions(name):
    net = randomise(CLASS_NETS[name]())
    x, t, cond = torch.randn(2, *net.shape), torch.rand(2), torch.tensor([0, 1])
    exact = net.double()(x.double(), t.double(), cond)
    assert exact.dtype == torch.float64
    half = net.bfloat16()(x.bfloat16(), t, cond)
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.08 * exact.norm()


def test_channels_last_gives_the_same_numbers():
    net = randomise(UNet(width=8, blocks=1, attention=(8,)))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    plain = net(x, t)
    fast = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "ncsnpp", "dit", "mlp_fourier"])
def test_networks_trace_into_one_graph(name):
    net = randomise(CLASS_NETS[name]())
    x, t, cond = torch.randn(2, *net.shape), torch.rand(2), torch.tensor([0, 3])
    traced = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x, t, cond), net(x, t, cond))


@pytest.mark.parametrize("name", ["unet", "ncsnpp", "dit"])
def test_blocks_can_be_checkpointed(name):
    net = randomise(CLASS_NETS[name]())
    x, t, cond = torch.randn(2, *net.shape), torch.rand(2), torch.tensor([0, 1])
    net(x, t, cond).square().sum().backward()
    direct = {key: p.grad.clone() for key, p in net.named_parameters()}
    net.zero_grad()
    blocks = [module for module in net.modules() if isinstance(module, net.checkpoint_blocks)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    net(x, t, cond).square().sum().backward()
    assert len(blocks) >= 2
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.grad, direct[key])


def test_attention_against_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
    out = attend(q, k, v, heads=2)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / 2, dim=-1)
        torch.testing.assert_close(out[..., part], weights @ v[..., part])
    assert CrossAttention(8, 6, 2)(q.float(), torch.randn(2, 5, 6)).abs().max() == 0


def dit_parameters(dim, depth, patch, channels, classes):
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    mlp = dim * 4 * dim + 4 * dim + 4 * dim * dim + dim
    block = attention + mlp + dim * 6 * dim + 6 * dim
    embeddings = (channels * patch**2 * dim + dim) + (256 * dim + dim + dim * dim + dim) + (classes + 1) * dim
    final = dim * 2 * dim + 2 * dim + dim * patch**2 * channels + patch**2 * channels
    return depth * block + embeddings + final


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(
    ("size", "dim", "depth", "millions"),
    [("S", 384, 12, 33), ("B", 768, 12, 130), ("L", 1024, 24, 458), ("XL", 1152, 28, 675)],
)
def test_dit_parameter_counts(size, dim, depth, millions, patch):
    with torch.device("meta"):
        net = dit(size, patch)
    found = sum(p.numel() for p in net.parameters())
    assert found == dit_parameters(dim, depth, patch, channels=4, classes=1000)
    if patch == 2:
        assert round(found / 1e6) == millions


def test_dit_patches_return_to_their_place():
    net = DiT((2, 6, 8), 2, 8, 0, 1)
    net.modulation.bias.data.zero_()
    with torch.no_grad():
        net.head.bias.copy_(torch.arange(8.0))
    out = net(torch.zeros(1, 2, 6, 8), torch.zeros(1))
    pattern = torch.arange(8.0).reshape(2, 2, 2).permute(2, 0, 1)
    assert torch.equal(out[0], pattern.repeat(1, 3, 4))


def test_dit_sees_where_a_patch_is():
    net = randomise(DiT((1, 8, 8), 2, 32, 2, 4))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([0.5])
    shifted = torch.roll(x, 2, dims=3)
    assert not torch.allclose(torch.roll(net(x, t), 2, dims=3), net(shifted, t), atol=1e-3)
    net.positions.zero_()
    torch.testing.assert_close(torch.roll(net(x, t), 2, dims=3), net(shifted, t), rtol=1e-4, atol=1e-5)


def test_grid_embedding_values():
    grid = grid_embedding(8, 2, 3)[0]
    row, column = 1, 2
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    torch.testing.assert_close(grid[row * 3 + column], torch.tensor(expected))


def test_toy_mlp_is_three_linear_layers_with_tanh():
    net = MLP()
    layers = [net.stem, *(layer for layer in net.body if isinstance(layer, nn.Linear))]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(3, 100), (100, 100), (100, 2)]
    x, t = torch.randn(4, 2), torch.rand(4)
    h = torch.cat([x, t[:, None]], 1)
    for layer in layers[:-1]:
        h = torch.tanh(h @ layer.weight.T + layer.bias)
    torch.testing.assert_close(net(x, t), h @ layers[-1].weight.T + layers[-1].bias)


def test_fourier_frequencies_survive_a_state_dict():
    first, second = MLP(fourier=4), MLP(fourier=4)
    assert isinstance(first.time, FourierEmbedding)
    second.load_state_dict(first.state_dict())
    x, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(first(x, t), second(x, t))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet(shape=(1, 7, 8)), r"multiples of 2 \(2 levels\), got 7x8"),
        (lambda: UNet(shape=(8, 8)), r"shape must be \(channels, height, width\), got \(8, 8\)"),
        (lambda: UNet(width=30), "width must be a positive multiple of 4, got 30"),
        (lambda: UNet(attention=(16,)), r"attention must name heights among \[8, 4\], got \[16\]"),
        (lambda: UNet(num_classes=3, text_dim=4), "a class or a text, got num_classes=3 and text_dim=4"),
        (lambda: DiT((1, 9, 9)), r"multiples of 2 \(the patch\), got 9x9"),
        (lambda: DiT(dim=30, heads=4), "dim must be a multiple of heads, got dim=30, heads=4"),
        (lambda: DiT(dim=30, heads=3), "divisible by 4, got 30"),
        (lambda: dit("M"), "size must be one of S, B, L, XL, got 'M'"),
        (lambda: MLP(shape=(2, 2)), r"shape must be \(dimensions,\), got \(2, 2\)"),
        (lambda: MLP(depth=1), "depth must be at least 2, got 1"),
        (lambda: MLP(activation="swish"), "activation must be one of tanh, silu, gelu, relu, got 'swish'"),
        (lambda: UNet()(torch.zeros(1, 1, 9, 9), torch.zeros(1)), r"samples of shape \(1, 8, 8\), got \(1, 9, 9\)"),
    ],
)
def test_errors_are_clear(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("class_path", "init_args", "kind"),
    [
        ("unet.UNet", {"width": 8, "attention": [4]}, UNet),
        ("ncsnpp.ddpmpp_cifar10", {"dropout": 0.1}, NCSNpp),
        ("dit.dit", {"size": "S", "patch": 4}, DiT),
        ("mlp.MLP", {"shape": [3], "activation": "silu"}, MLP),
    ],
)
def test_networks_are_configurable_by_class_path(class_path, init_args, kind):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    config = parser.parse_object(
        {"net": {"class_path": f"penstock.lightning_modules.nets.{class_path}", "init_args": init_args}}
    )
    with torch.device("meta"):
        assert isinstance(parser.instantiate(config).net, kind)


def test_half_precision_times_are_scaled_in_float32():
    t = torch.tensor([0.40625, 0.40234375], dtype=torch.bfloat16)
    torch.testing.assert_close(positional_embedding(t, 8, 999.0), positional_embedding(t.float() * 999, 8))


def test_default_unet_is_as_small_as_its_docstring_says():
    net = UNet(num_classes=10)
    assert 0.25e6 < sum(p.numel() for p in net.parameters()) < 0.35e6
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(128, 1, 8, 8), torch.rand(128), torch.randint(10, (128,))).sum().backward()
    assert 3.5e9 < counter.get_total_flops() < 4.5e9
