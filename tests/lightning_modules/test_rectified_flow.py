"""The RectifiedFlow module: official numbers end to end, randomness, guidance, transfer."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.flow.couplings import MinibatchOT
from penstock.lightning_modules.flow.likelihood import bits_per_dim
from penstock.lightning_modules.flow.losses import SquaredError, flow_matching_loss
from penstock.lightning_modules.flow.paths import VE, VP, Cosine, Linear
from penstock.lightning_modules.flow.solvers import (
    DDIM,
    RK45,
    DPMSolverPP2M,
    EDMHeun,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
)
from penstock.lightning_modules.flow.times import Fixed, Grid, Uniform
from penstock.lightning_modules.flow.transfer import FeatureError
from penstock.lightning_modules.nets.mlp import MLP
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.rectified_flow import RectifiedFlow
from penstock.lightning_modules.weights.rectified_flow import convert

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rectified_flow"
ADAM = partial(torch.optim.Adam, lr=1e-3)


def golden(name):
    tensors = load_file(GOLDEN / name)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    net = NCSNpp(shape=(3, 16, 16), width=8, mult=(1, 2), blocks=2, attention=(8,))
    net.load_state_dict(convert(weights))
    return net, tensors


class Stored:
    """Draws that hand out stored numbers."""

    def __init__(self, noise, u):
        self.noise, self.u = noise, u

    def normal(self, name, shape=(), dtype=None):
        return self.noise

    def uniform(self, name, shape=()):
        return self.u if not shape else self.u[:, None].expand(-1, *shape)

    def both(self, normal, uniform, dtype):
        return self.noise, self.uniform(*uniform)


VARIANTS = {
    "rf": (Uniform(1e-3), "mean"),
    "rf_sum": (Uniform(1e-3), "half_sum"),
    "reflow_uniform": (Uniform(1e-3), "mean"),
    "distill_t0": (Fixed(1e-3), "mean"),
    "distill_t1": (Fixed(1.0), "mean"),
    "distill_k": (None, "mean"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_official_losses_and_gradients(name):
    net, tensors = golden("03_losses.safetensors")
    times, reduction = VARIANTS[name]
    u = tensors["in/u"]
    if times is None:
        k = int(tensors["in/k"])
        times, u = Grid(k, 1e-3), (tensors["in/j"].double() + 0.5) / k
    flow = RectifiedFlow(net, ADAM, times=times, loss=SquaredError(reduction)).double()
    batch = {"image": tensors["in/x1"]}
    loss = flow.losses(batch, Stored(tensors["in/z0"], u)).mean()
    torch.testing.assert_close(loss, tensors[f"out/{name}/loss"], rtol=1e-8, atol=1e-10)
    loss.backward()
    expected = tensors[f"out/{name}/grad/all_modules.2.weight"]
    found = [p.grad for p in net.parameters() if p.shape == expected.shape]
    assert any(torch.allclose(g, expected, rtol=1e-8, atol=1e-10) for g in found)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_official_euler_samples(steps):
    net, tensors = golden("04_sampling.safetensors")
    flow = RectifiedFlow(net, ADAM).double()
    with torch.no_grad():
        x = flow.decode(tensors["in/z"].double(), steps=steps)
    torch.testing.assert_close((x + 1) / 2, tensors[f"out/net_euler{steps}"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(x, tensors[f"out/net_euler_ode{steps}_raw"], rtol=1e-8, atol=1e-10)
    assert flow.nfe == steps


@pytest.mark.slow
def test_official_adaptive_samples_and_their_inverse():
    net, tensors = golden("04_sampling.safetensors")
    flow = RectifiedFlow(net, ADAM, solver=RK45(backend="scipy"))
    with torch.no_grad():
        x = flow.decode(tensors["in/z"])
        assert abs(flow.nfe - int(tensors["out/net_rk45_nfe"])) <= 12
        back = flow.encode(tensors["out/net_ode_forward"])
    torch.testing.assert_close((x + 1) / 2, tensors["out/net_rk45"], rtol=0, atol=1e-4)
    torch.testing.assert_close(back, tensors["out/net_ode_reverse_of_forward"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_official_likelihood():
    net, tensors = golden("05_likelihood.safetensors")
    flow = RectifiedFlow(net, ADAM)
    x = tensors["in/x"]
    bpd = bits_per_dim(
        flow.log_prob(x, epsilon=tensors["in/epsilon"], solver=RK45(backend="scipy")), x[0].numel(), offset=7
    )
    torch.testing.assert_close(bpd, tensors["out/net_bpd"], rtol=0, atol=1e-3)


def flow_of(**options):
    torch.manual_seed(0)
    net = UNet((1, 8, 8), width=8, blocks=1, num_classes=10)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return RectifiedFlow(net, ADAM, **options).eval()


def batch_of(n=12):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1
    return {"image": image, "label": torch.arange(n) % 10, "index": torch.arange(n) * 7 + 3}


def test_a_sample_loses_the_same_in_any_batch():
    flow, batch = flow_of(condition_dropout=0.5), batch_of()
    whole = flow.losses(batch, Draws(5, 2, batch["index"]))
    half = {k: v[6:] for k, v in batch.items()}
    torch.testing.assert_close(flow.losses(half, Draws(5, 2, half["index"])), whole[6:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(flow.losses(batch, Draws(5, 3, batch["index"])), whole)
    assert not torch.allclose(flow.losses(batch, Draws(6, 2, batch["index"])), whole)


def test_conditions_are_dropped_at_the_stated_rate():
    seen = []

    class Net(nn.Module):
        shape, num_classes = (1, 1, 1), 10

        def drop_condition(self, cond, mask):
            return torch.where(mask, 10, cond)

        def forward(self, x, t, cond):
            seen.append(cond)
            return x

    batch = {"image": torch.zeros(4000, 1, 1, 1), "label": torch.zeros(4000, dtype=torch.long)}
    batch["index"] = torch.arange(4000)
    RectifiedFlow(Net(), ADAM, condition_dropout=0.2).losses(batch, Draws(0, 0, batch["index"]))
    share = (seen[0] == 10).double().mean()
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 4000)


def test_same_generator_seed_same_samples_and_guidance_counts_calls():
    flow, cond = flow_of(), torch.arange(4)
    draw = partial(flow.sample, 4, steps=3)
    with torch.no_grad():
        a, b, other = (draw(cond=cond, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.allclose(a, other)
        assert flow.nfe == 3
        guided = draw(cond=cond, generator=torch.Generator().manual_seed(1), guidance=2.0)
        assert flow.nfe == 6
    assert not torch.allclose(a, guided)


SOLVERS = [Euler(), Heun(), Midpoint(), RK45(), DDIM(), DDIM(1.0), DPMSolverPP2M(), EDMHeun(), EulerMaruyama("sigma")]


@pytest.mark.parametrize("path", [Linear(), VP(), Cosine(), VE()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_every_solver_samples_every_path(path, solver):
    """For a net that is the exact velocity of data N(0, 0.5^2), samples have that standard deviation."""

    class Exact(nn.Module):
        shape, num_classes = (64,), 0

        def forward(self, x, t, cond=None):
            a, s, da, ds = (f(t.double())[:, None] for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
            return (x * (a * da * 0.25 + s * ds) / (a * a * 0.25 + s * s)).to(x.dtype)

    low = max(1e-3, path.t_range[0])
    flow = RectifiedFlow(Exact(), ADAM, path=path, solver=solver, eps=low, key="points")
    x = flow.sample(500, steps=1000, generator=torch.Generator().manual_seed(0))
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_encode_inverts_decode():
    flow = flow_of(solver=RK45(1e-7, 1e-7)).double()
    x0, cond = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.arange(3)
    with torch.no_grad():
        back = flow.encode(flow.decode(x0, cond=cond), cond=cond)
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-4)


def test_source_of_the_batch_replaces_noise_and_ot_pairs_it():
    net = MLP((2,))
    flow = RectifiedFlow(net, ADAM, key="points", coupling=MinibatchOT())
    x1 = torch.randn(16, 2)
    shuffled = x1[torch.randperm(16)]
    batch = {"points": x1, "source": shuffled, "index": torch.arange(16)}
    nn.init.zeros_(net.body[-1].weight)
    nn.init.zeros_(net.body[-1].bias)
    losses = flow.losses(batch, Draws(0, 0, batch["index"]))
    torch.testing.assert_close(losses, torch.zeros(16))


def test_feature_loss_against_an_explicit_jacobian():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x0, x1, t = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.rand(4).double()
    net = nn.Linear(3, 3).double()

    def velocity(x, t):
        return net(x)

    loss = flow_matching_loss(velocity, x0, x1, t, loss=FeatureError(features))
    x_t = t[:, None] * x1 + (1 - t[:, None]) * x0
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(features, x_t[i])
        residual = jacobian @ (x1[i] - x0[i] - net(x_t[i]))
        assert loss[i].item() == pytest.approx(residual.square().mean().item(), rel=1e-9)
    loss.sum().backward()
    assert net.weight.grad.abs().sum() > 0
