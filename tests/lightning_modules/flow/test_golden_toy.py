"""Official rectified-flow samplers and likelihood on the closed-form velocity (golden files 04 and 05)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.flow import grids
from penstock.lightning_modules.flow.likelihood import bits_per_dim, divergence, log_prob
from penstock.lightning_modules.flow.solvers import RK45, Euler

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "rectified_flow"


@pytest.fixture(scope="module")
def sampling():
    return load_file(GOLDEN / "04_sampling.safetensors")


@pytest.fixture(scope="module")
def likelihood():
    return load_file(GOLDEN / "05_likelihood.safetensors")


def toy(numbers):
    m, s = numbers["in/toy_mean"].item(), numbers["in/toy_std"].item()

    def velocity(x, t):
        t = t[:, None, None, None]
        return m + (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * (x - t * m)

    return velocity


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler(sampling, steps):
    seen = []

    def velocity(x, t):
        seen.append(999 * t[0])
        return toy(sampling)(x, t)

    out = Euler()(grids.compressed(velocity), sampling["in/z"].double(), grids.uniform(steps)).x
    torch.testing.assert_close((out + 1) / 2, sampling[f"out/toy_euler{steps}"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.stack(seen), sampling[f"out/toy_euler{steps}_labels"], rtol=1e-8, atol=1e-10)


def test_rk45(sampling):
    there = RK45()(toy(sampling), sampling["in/z"], torch.tensor([1e-3, 1.0]))
    torch.testing.assert_close((there.x + 1) / 2, sampling["out/toy_rk45"], rtol=0, atol=1e-4)
    torch.testing.assert_close(there.x, sampling["out/toy_ode_forward"], rtol=0, atol=1e-4)
    assert abs(there.nfe - sampling["out/toy_rk45_nfe"].item()) <= 12
    back = RK45()(toy(sampling), there.x, torch.tensor([1.0, 1e-3]))
    torch.testing.assert_close(back.x, sampling["out/toy_ode_reverse_of_forward"], rtol=0, atol=1e-4)


def test_divergence(likelihood):
    x, epsilon = likelihood["in/x"].double(), likelihood["in/epsilon"].double()
    drift, div = divergence(toy(likelihood), x, likelihood["in/t"], epsilon)
    torch.testing.assert_close(drift, likelihood["out/toy_drift"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(div, likelihood["out/toy_div"], rtol=1e-8, atol=1e-10)


def test_likelihood(likelihood):
    x = likelihood["in/x"]
    result = log_prob(toy(likelihood), x, torch.tensor([1.0, 1e-5]), epsilon=likelihood["in/epsilon"])
    bits = bits_per_dim(result.log_prob, x[0].numel(), offset=7)
    torch.testing.assert_close(bits, likelihood["out/toy_bpd"], rtol=0, atol=1e-4)
    torch.testing.assert_close(result.z, likelihood["out/toy_z"], rtol=0, atol=1e-4)
    assert abs(result.nfe - likelihood["out/toy_nfe"].item()) <= 12
