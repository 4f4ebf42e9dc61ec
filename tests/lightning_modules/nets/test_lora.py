"""LoRA against numbers of the official BOSS implementation, and its counts at full size."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from penstock.lightning_modules.nets import lora
from penstock.lightning_modules.nets.ncsnpp import NCSNpp, ddpmpp_cifar10, ncsnpp_256
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.weights.boss import convert, invert

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "boss" / "04_lora.safetensors"
OPTIONS = {
    **{"shape": (3, 8, 8), "width": 8, "mult": (1, 2), "blocks": 1, "attention": (4,)},
    **{"embedding": "fourier", "fir": True, "progressive": True, "divide_by_time": True},
}
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def golden():
    tensors = load_file(GOLDEN)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    net = NCSNpp(**OPTIONS)
    lora.adapt(net, int(tensors["in/rank"]))
    net.load_state_dict(convert(weights))
    return net.double(), tensors, weights


def velocity(net, tensors):
    return net(tensors["in/x"].double(), tensors["in/labels"] / 999)


def test_official_output_and_gradients():
    net, tensors, _ = golden()
    v = velocity(net, tensors)
    torch.testing.assert_close(v, tensors["out/v"], **EXACT)
    (v * tensors["in/cotangent"]).sum().backward()
    trained = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert all(name.endswith((lora.A, lora.B)) for name in trained)
    assert len(trained) == int(tensors["out/num_trainable_tensors"])
    assert sum(g.numel() for g in trained.values()) == int(tensors["out/num_trainable"])
    grads = invert({name: p.grad if p.grad is not None else p.detach() for name, p in net.named_parameters()})
    expected = {k.removeprefix("out/grad/"): v for k, v in tensors.items() if k.startswith("out/grad/")}
    assert len(expected) == 6
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, **EXACT)


def test_base_start_and_merged_network():
    net, tensors, _ = golden()
    full = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(lora.B):
                p.zero_()
    torch.testing.assert_close(velocity(net, tensors), tensors["out/v_base"], **EXACT)
    torch.testing.assert_close(velocity(net, tensors), tensors["out/v_at_init"], **EXACT)
    net.load_state_dict(full, strict=False)
    lora.merge(net)
    assert net.state_dict().keys() == NCSNpp(**OPTIONS).state_dict().keys()
    torch.testing.assert_close(velocity(net, tensors), tensors["out/v_merged"], **EXACT)
    merged = invert(net.state_dict())
    expected = {k.removeprefix("out/merged/"): v for k, v in tensors.items() if k.startswith("out/merged/")}
    assert len(expected) == 3
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, **EXACT)


def test_the_official_state_dict_comes_back():
    net, _, weights = golden()
    restored = invert(net.state_dict(), 2000, 378.0)
    assert restored.keys() == weights.keys()
    assert all(restored[k].shape == v.shape for k, v in weights.items())
    assert all(torch.equal(restored[k].to(v.dtype), v) for k, v in weights.items() if k != "sigmas")


@pytest.mark.parametrize(
    ("build", "scales", "numbers", "tensors", "entries", "digest"),
    [
        (ddpmpp_cifar10, 1000, 1163896, 326, 1054, "abab825328da7144ad76e194e7c318f0c20810dfb2c9dc89b00bc1d7990c31e2"),
        (ncsnpp_256, 2000, 1322248, 394, 1237, "52d6a0b38644b1542f97c84d4a19459be593669e195bd8ab95b93863a759797f"),
    ],
    ids=["cifar10", "256"],
)
def test_full_size(build, scales, numbers, tensors, entries, digest):
    with torch.device("meta"):
        net = build()
        total = sum(p.numel() for p in net.parameters())
        lora.adapt(net)
    trained = [p for p in net.parameters() if p.requires_grad]
    assert (sum(p.numel() for p in trained), len(trained)) == (numbers, tensors)
    if scales == 2000:
        assert f"{numbers / total:.3%}" == "2.016%"
    state = invert(net.state_dict(), scales)
    assert len(state) == entries
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_begins_as_it_was_to_the_bit_and_merges():
    torch.manual_seed(0)
    net, x, t = UNet((1, 8, 8), width=8, blocks=1).eval(), torch.randn(2, 1, 8, 8), torch.rand(2)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    plain = {k: v.clone() for k, v in net.state_dict().items()}
    before = net(x, t)
    lora.adapt(net)
    assert torch.equal(net(x, t), before)
    assert {k for k in net.state_dict() if "lora" not in k} == {
        k.removesuffix(".weight") + lora.ORIGINAL if f"{k.removesuffix('.weight')}{lora.A}" in net.state_dict() else k
        for k in plain
    }
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    adapted = net(x, t)
    assert not torch.allclose(adapted, before)
    lora.merge(net)
    torch.testing.assert_close(net(x, t), adapted, rtol=1e-6, atol=1e-6)
    assert net.state_dict().keys() == plain.keys()


def test_plain_weights_go_into_an_adapted_network():
    torch.manual_seed(0)
    first, second = UNet((1, 8, 8), width=8, blocks=1), UNet((1, 8, 8), width=8, blocks=1)
    lora.adapt(second)
    second.load_state_dict(lora.base_state(second, first.state_dict()))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(first.eval()(x, t), second.eval()(x, t))


def test_a_small_change_of_bfloat16_weights_is_not_rounded_away():
    torch.manual_seed(0)
    net, x = nn.Linear(256, 256), torch.randn(64, 256)
    plain = nn.Linear(256, 256)
    plain.load_state_dict(net.state_dict())
    lora.adapt(net.to(torch.bfloat16), 4)
    low_rank = net.parametrizations.weight[0]
    assert low_rank.lora_A.dtype == low_rank.lora_B.dtype == torch.float32
    nn.init.normal_(low_rank.lora_B, std=1e-4)
    change = low_rank.scale * x @ low_rank.lora_A.T @ low_rank.lora_B.T
    assert change.std() < 2**-9 * plain(x).std()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(low_rank.output(net, x).float(), change, rtol=0.03, atol=0.03 * change.std().item())
        net(x).float().square().mean().backward()
    assert low_rank.lora_A.grad.abs().sum() > 0


def test_convolutions_with_a_stride_and_frozen_layers():
    torch.manual_seed(0)
    conv, grouped = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, groups=2)
    still = nn.Linear(2, 2).requires_grad_(False)
    net = nn.ModuleList([conv, grouped, still])
    lora.adapt(net, 2)
    assert [hasattr(layer, "parametrizations") for layer in net] == [True, False, False]
    nn.init.normal_(conv.parametrizations.weight[0].lora_B)
    x = torch.randn(2, 3, 8, 8)
    adapted = conv(x)
    lora.merge(net)
    torch.testing.assert_close(conv(x), adapted, rtol=1e-5, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="rank 0"):
        lora.adapt(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="no linear layer"):
        lora.adapt(nn.Sequential(nn.GELU()))
