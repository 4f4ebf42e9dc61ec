"""2-rectified flow++ (arXiv 2405.20320) as a configuration: golden law of time and optimiser, closed forms, a toy."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.callbacks.ema import EMA
from penstock.lightning_modules.flow.anchored import AnchoredEuler
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.losses import flow_matching_loss
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.solvers import Euler, Heun
from penstock.lightning_modules.flow.times import Uniform, UShaped
from penstock.lightning_modules.nets.mlp import MLP
from penstock.lightning_modules.schedules import LinearWarmup

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rectified_flow_pp"
EXACT = {"rtol": 1e-8, "atol": 1e-10}


@pytest.mark.parametrize("i", [0, 1])
def test_law_of_time(i):
    tensors = load_file(GOLDEN / "03_time_density.safetensors")
    a, grid, u = tensors["in/a"][i].item(), tensors["in/grid"], tensors["in/U"]
    out = {k.removeprefix(f"out/a{i}/"): v for k, v in tensors.items()}
    law = UShaped(a)
    torch.testing.assert_close(law.density(grid), out["pdf_u_shaped"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((out["pdf_one_sided"] + out["pdf_one_sided"].flip(0)) / 2, out["pdf_u_shaped"])
    torch.testing.assert_close(grid, 1 - grid.flip(0))
    mixture = (out["cdf_one_sided"] + 1 - out["cdf_one_sided"].flip(0)) / 2
    torch.testing.assert_close(law.quantile(mixture), grid, rtol=1e-9, atol=1e-9)
    back = torch.expm1(a * out["ppf_one_sided"]) / torch.expm1(torch.tensor(a, dtype=torch.float64))
    torch.testing.assert_close(back, u, rtol=1e-7, atol=1e-7)


def test_official_pool_has_our_law_and_margins():
    tensors = load_file(GOLDEN / "03_time_density.safetensors")
    draws, order = tensors["in/one_sided_draws"], tensors["in/perm"]
    pool = torch.cat([draws, 1 - draws])[order][: len(draws)]
    squeezed = pool * (1 - 2e-5) + 1e-5
    torch.testing.assert_close(squeezed.float(), tensors["out/sample_t"], rtol=2e-7, atol=1e-9)
    plain, law = UShaped(4.0), UShaped(4.0, eps=1e-5)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(law.quantile(u), plain.quantile(u) * (1 - 2e-5) + 1e-5, rtol=1e-12, atol=1e-15)
    assert law.quantile(torch.rand(10000).clamp(2**-24, 1 - 2**-24)).float().max() < 1


def test_optimiser_with_average_and_warmup():
    tensors = load_file(GOLDEN / "07_adam_ema.safetensors")
    parameters = [torch.nn.Parameter(tensors[f"in/p{i}"].clone()) for i in range(3)]
    optimizer = torch.optim.Adam(parameters, lr=tensors["in/lr"].item())
    schedule = LinearWarmup(optimizer, int(tensors["in/warmup"]), stop_short=True)
    ema = EMA(tensors["in/ema_decay"].item(), warmup=False, start=int(tensors["in/ema_after_steps"]) + 2)
    ema._weights = [p.data for p in parameters]
    ema._shadow = [p.data.clone() for p in parameters]
    for step in range(5):
        for i, p in enumerate(parameters):
            p.grad = tensors[f"in/grad_step{step}_p{i}"].clone()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(tensors[f"out/step{step}_lr"].item(), rel=1e-12)
        optimizer.step()
        schedule.step()
        ema.update()
        for i, p in enumerate(parameters):
            torch.testing.assert_close(p.data, tensors[f"out/step{step}_p{i}"], **EXACT)
            if step >= 2:
                torch.testing.assert_close(ema._shadow[i], tensors[f"out/step{step}_ema_p{i}"], **EXACT)
            else:
                assert torch.equal(ema._shadow[i], p.data)


def trained(times, x0, x1, steps=600):
    """A small network after `steps` of Adam on pairs, with its losses; the same start and batches for every law."""
    torch.manual_seed(0)
    net = MLP((2,), width=64, depth=4, activation="silu")
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(x0), (256,), generator=generator)
        t = times.quantile(torch.rand(256, generator=generator).clamp(1e-6, 1 - 1e-6))
        loss = flow_matching_loss(net, x0[rows], x1[rows], t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def test_two_modes_after_one_reflow():
    means = torch.tensor([[-2.0, 1.0], [2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
    flow = MixtureFlow(Mixture.uniform(means, 0.3))
    noise = torch.randn(4096, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = Heun()(flow.velocity, noise, uniform(100)).x
    x0, x1 = noise.float(), pairs.float()
    nets = {law: trained(law, x0[:3072], x1[:3072]) for law in (Uniform(1e-5), UShaped(4.0, eps=1e-5))}
    held = x0[3072:], x1[3072:]

    @torch.no_grad()
    def error(net, t):
        return flow_matching_loss(net, *held, torch.full((len(held[0]),), t)).mean().item()

    at_ends = {type(law).__name__: error(net, 1e-3) + error(net, 1 - 1e-3) for law, net in nets.items()}
    assert at_ends["UShaped"] < 0.9 * at_ends["Uniform"]
    second = nets[UShaped(4.0, eps=1e-5)]
    with torch.no_grad():
        one_step = AnchoredEuler()(second, held[0], uniform(1)).x
    first = Euler()(flow.velocity, noise[3072:], uniform(1)).x.float()
    assert (one_step - held[1]).square().mean() < 0.2 * (first - held[1]).square().mean()
