"""EDM's networks as velocity fields: numbers of the official implementation, presets, closed forms, the contract."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from penstock.lightning_modules.callbacks.perf import checkpoint_activations
from penstock.lightning_modules.flow.anchored import AnchoredEuler, EDMSampler
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.paths import EDM
from penstock.lightning_modules.nets.edm import EDMVelocity, dhariwal_imagenet64, song_unet_64, song_unet_cifar10
from penstock.lightning_modules.nets.edm_unets import DhariwalUNet, SongUNet

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "rectified_flow_pp"
EXACT = {"rtol": 1e-8, "atol": 1e-10}
PAIRS = {"rtol": 1e-7, "atol": 1e-7}


def song(**options):
    return EDMVelocity(SongUNet((3, 8, 8), width=8, mult=(1, 2), blocks=1, attention=(4,), **options))


def adm(**options):
    return EDMVelocity(DhariwalUNet((3, 8, 8), 16, (1, 4), 1, (4,), **{"num_classes": 5, **options}))


CASES = {"01_songunet_velocity": song, "02_dhariwal_velocity": adm}


def randomise(net):
    torch.manual_seed(1)
    for p in net.parameters():
        p.data = torch.randn_like(p) * (0.5 / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.1)
    return net


def golden(name, dtype=torch.float64):
    """The network, the tensors, x, t (the project's), cond."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    net = CASES[name]()
    net.load_state_dict({k.removeprefix("weights/"): v.float() for k, v in tensors.items() if k.startswith("weights/")})
    labels = tensors.get("in/class_labels")
    cond = None if labels is None else labels.argmax(1)
    return net.to(dtype), tensors, tensors["in/x"].to(dtype), (1 - tensors["in/t"]).to(dtype), cond


def close(actual, tensors, name, **tolerance):
    torch.testing.assert_close(actual, tensors[f"out/{name}"], **(tolerance or EXACT), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_velocity_predictions_denoiser_and_gradients(name):
    net, tensors, x, t, cond = golden(name)
    x.requires_grad_()
    v = net(x, t, cond)
    close(-v, tensors, "v")
    s = (1 - t)[:, None, None, None]
    close(x + s * v, tensors, "x_hat")
    close(x - (1 - s) * v, tensors, "z_hat")
    sigma = (1 - t) / t
    close(sigma, tensors, "sigma")
    y = x / (1 - s)
    close(net.denoise(y, sigma, cond), tensors, "D")
    c_in = 1 / (0.25 + sigma.square()).sqrt()
    close(net.model(c_in[:, None, None, None] * y, sigma.log() / 4, cond), tensors, "F")
    (-v * tensors["in/cotangent"]).sum().backward()
    close(x.grad, tensors, "grad_x")
    names = [key.removeprefix("out/grad/") for key in tensors if key.startswith("out/grad/")]
    assert len(names) >= 4
    for key in names:
        close(net.get_parameter(key).grad, tensors, f"grad/{key}")


@pytest.mark.parametrize("name", CASES)
def test_float32_is_accurate_at_every_time(name):
    net, tensors, x, t, cond = golden(name, torch.float32)
    v, exact = -net(x, t, cond), tensors["out/v"].float()
    away = (tensors["in/t"] >= 0.05) & (tensors["in/t"] <= 0.95)
    torch.testing.assert_close(v[away], tensors["out/v_f32"][away], rtol=1e-4, atol=1e-4)
    assert ((v - exact).flatten(1).norm(dim=1) < 5e-4 * exact.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("update", ["new", "default"])
@torch.no_grad()
def test_two_steps_from_noise(name, update):
    net, tensors, x, _, cond = golden(name)
    solution = AnchoredEuler(update)(lambda x, t: net(x, t, cond), x, uniform(2))
    close(solution.x, tensors, f"sample_{update}_N2")
    assert solution.nfe == 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("kind", "order", "steps"), [("heun5", 2, 5), ("euler4", 1, 4)])
@torch.no_grad()
def test_edm_sampler_makes_the_official_pairs(name, kind, order, steps):
    net, tensors, x, _, cond = golden(name)
    solution = EDMSampler(order)(lambda x, t: net(x, t, cond), x, uniform(steps))
    close(solution.x, tensors, f"edm_pairs_{kind}", **PAIRS)
    assert solution.nfe == (2 * steps - 1 if order == 2 else steps)

    path = EDM()

    def in_sigma(y, t):
        return (net.denoise(y, path.sigma(t), cond) - y) / (1 - t)[:, None, None, None]

    again = EDMSampler(order)(in_sigma, x * path.source_std, uniform(steps), path=path)
    close(again.x, tensors, f"edm_pairs_{kind}", **PAIRS)


@pytest.mark.parametrize(
    ("build", "parameters", "entries", "digest"),
    [
        (song_unet_cifar10, 56_397_827, 432, "9f4e045d77df6be9f4928c5e9513ff28e6ec2dc08ef5d429b5261ec8b33ff20a"),
        (song_unet_64, 62_761_091, 563, "9f1188b393e2e0f6cb9779127481b0684bbbafb9f7d5f08ae6e5bf2df4275211"),
        (dhariwal_imagenet64, 295_899_267, 553, "a59bb78fad0da4fa29f9b3a2aa6f9f90b8498dfc3b531c9b26c20c22e80fee2a"),
    ],
)
def test_presets_have_the_published_sizes_and_official_names(build, parameters, entries, digest):
    with torch.device("meta"):
        net = build()
        assert net(torch.empty(2, *net.shape), torch.empty(2)).shape == (2, *net.shape)
    state = net.state_dict()
    lines = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in state.items()))
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(state) == entries
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


class Zero(nn.Module):
    shape, num_classes = (1, 1, 1), 0

    def forward(self, x, c_noise, cond=None):
        return torch.zeros_like(x)


class Gaussian(nn.Module):
    """F of the exact denoiser `std^2 y / (std^2 + sigma^2)` of data N(0, std^2)."""

    shape, num_classes = (1, 1, 1), 0

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x, c_noise, cond=None):
        sigma = (4 * c_noise).exp()[:, None, None, None]
        root = (sigma.square() + 0.25).sqrt()
        y = x * root
        skip, out = 0.25 / root.square(), sigma * 0.5 / root
        return (self.std**2 / (self.std**2 + sigma.square()) * y - skip * y) / out


TIMES = torch.tensor([1e-5, 0.1, 0.5, 0.9, 1 - 1e-5], dtype=torch.float64)


@pytest.mark.parametrize(("model", "std"), [(Zero(), 0.5), (Gaussian(0.5), 0.5), (Gaussian(1.3), 1.3)])
def test_gaussian_data_have_the_exact_velocity(model, std):
    x = torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(5, 1, 1, 1)
    s = (1 - TIMES).reshape(5, 1, 1, 1)
    paper = (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2) * x
    torch.testing.assert_close(EDMVelocity(model)(x, TIMES), -paper, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("build", [song, adm])
def test_both_ends_of_time_are_finite_in_float32(build):
    net = randomise(build())
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 1e-7, 1 - 1e-7, 1.0])
    v = net(x, t)
    assert v.isfinite().all()
    torch.testing.assert_close(v[0], net(x, t + 1e-5)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", [lambda: song(num_classes=3), lambda: adm(num_classes=3)], ids=["song", "adm"])
def test_classes_follow_the_contract(build):
    net = randomise(build())
    x, t, cond = torch.randn(4, 3, 8, 8), torch.rand(4) * 0.8 + 0.1, torch.tensor([0, 1, 2, 0])
    out = net(x, t, cond)
    assert net.num_classes == 3
    assert not torch.allclose(out, net(x, t, torch.tensor([1, 1, 2, 0])), atol=1e-4)
    everything, nothing = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(net(x, t, net.drop_condition(cond, everything)), net(x, t))
    assert torch.equal(net.drop_condition(cond, nothing), cond)
    with pytest.raises(ValueError, match="int64 class labels"):
        net(x, t, torch.rand(4, 2, 6))


@pytest.mark.parametrize("build", [song, adm])
def test_every_parameter_has_a_gradient_and_checkpointing_changes_nothing(build):
    net = randomise(build())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7])
    net(x, t).square().sum().backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    assert {name for name, g in grads.items() if not g.any()} <= {"model.map_augment.weight", "model.map_label.weight"}
    net.zero_grad()
    checkpoint_activations(nn.ModuleList([net]))
    net(x, t).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, grads[name])


@pytest.mark.parametrize("build", [song, adm])
def test_half_precision_stays_near(build):
    net = randomise(build())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    exact = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, t)
    assert mixed.dtype == torch.float32
    assert (mixed - exact).norm() < 0.05 * exact.norm()
    assert net.bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16


def test_start_is_the_gaussian_flow_and_weights_have_the_stated_variance():
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    torch.testing.assert_close(adm()(x, t, torch.tensor([0, 4])), EDMVelocity(Zero3())(x, t))
    torch.testing.assert_close(song()(x, t), EDMVelocity(Zero3())(x, t), atol=1e-3, rtol=0)
    block = SongUNet((3, 8, 8), width=64, mult=(1,), blocks=1, attention=(8,)).enc["8x8_block0"]
    assert block.conv0.weight.var().item() == pytest.approx(1 / (64 * 9), rel=0.05)
    assert block.qkv.weight.var().item() == pytest.approx(0.2 * 2 / (64 + 192), rel=0.05)
    assert block.conv1.weight.std().item() == pytest.approx(1e-5 / math.sqrt(64 * 9), rel=0.05)
    assert DhariwalUNet(width=64, mult=(1,), shape=(3, 8, 8)).map_label.weight.std().item() == pytest.approx(
        1, rel=0.05
    )


class Zero3(Zero):
    shape = (3, 8, 8)


def test_errors_are_clear():
    with pytest.raises(ValueError, match=r"multiples of 4 \(3 levels\), got 30x32"):
        SongUNet((3, 30, 32))
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, got 6"):
        DhariwalUNet(width=6)
    net = song()
    with pytest.raises(ValueError, match=r"samples of shape \(3, 8, 8\), got \(3, 4, 4\)"):
        net(torch.zeros(1, 3, 4, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="unconditional"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"margin must be in \(0, 0.5\), got 0"):
        EDMVelocity(net, margin=0)
    with pytest.raises(ValueError, match="sigma_data must be positive, got -1"):
        EDMVelocity(net, sigma_data=-1)
