"""Official rectified-flow samplers and likelihood with a network (golden files 04 and 05).

The network is rough in t (about a thousand calls at tolerance 1e-5), so that only the official integrator, RK45 with
the scipy backend, takes the same steps.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.flow import grids
from penstock.lightning_modules.flow.likelihood import bits_per_dim, divergence, log_prob
from penstock.lightning_modules.flow.solvers import RK45, Euler
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.weights.rectified_flow import convert

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "rectified_flow"


def load(name):
    numbers = load_file(GOLDEN / name)
    net = NCSNpp(shape=(3, 16, 16), width=8, mult=(1, 2), blocks=2, attention=(8,)).eval().requires_grad_(False)
    net.load_state_dict(
        convert({k.removeprefix("weights/"): v for k, v in numbers.items() if k.startswith("weights/")})
    )
    return numbers, net


@pytest.fixture
def sampling():
    return load("04_sampling.safetensors")


@pytest.fixture
def likelihood():
    return load("05_likelihood.safetensors")


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler(sampling, steps):
    numbers, net = sampling
    out = Euler()(grids.compressed(net.double()), numbers["in/z"].double(), grids.uniform(steps)).x
    torch.testing.assert_close((out + 1) / 2, numbers[f"out/net_euler{steps}"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(out, numbers[f"out/net_euler_ode{steps}_raw"], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_rk45(sampling):
    numbers, net = sampling
    solver = RK45(backend="scipy")
    there = solver(net, numbers["in/z"], torch.tensor([1e-3, 1.0], dtype=torch.float64))
    torch.testing.assert_close((there.x + 1) / 2, numbers["out/net_rk45"], rtol=0, atol=1e-4)
    torch.testing.assert_close(there.x, numbers["out/net_ode_forward"], rtol=0, atol=1e-4)
    assert abs(there.nfe - numbers["out/net_rk45_nfe"].item()) <= 12
    back = solver(net, there.x, torch.tensor([1.0, 1e-3], dtype=torch.float64))
    torch.testing.assert_close(back.x, numbers["out/net_ode_reverse_of_forward"], rtol=0, atol=1e-4)


def test_divergence(likelihood):
    numbers, net = likelihood
    x, epsilon = numbers["in/x"].double(), numbers["in/epsilon"].double()
    drift, div = divergence(net.double(), x, numbers["in/t"], epsilon)
    torch.testing.assert_close(drift, numbers["out/net_drift"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(div, numbers["out/net_div"], rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_likelihood(likelihood):
    numbers, net = likelihood
    x, grid = numbers["in/x"], torch.tensor([1.0, 1e-5], dtype=torch.float64)
    result = log_prob(net, x, grid, solver=RK45(backend="scipy"), epsilon=numbers["in/epsilon"])
    bits = bits_per_dim(result.log_prob, x[0].numel(), offset=7)
    torch.testing.assert_close(bits, numbers["out/net_bpd"], rtol=0, atol=1e-3)
    torch.testing.assert_close(result.z, numbers["out/net_z"], rtol=0, atol=1e-3)
    assert abs(result.nfe - numbers["out/net_nfe"].item()) <= 12
