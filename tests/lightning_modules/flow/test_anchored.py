"""Samplers of 2-rectified flow++: numbers of the official implementation, identities, margins, errors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.flow.anchored import AnchoredEuler, AnchoredHeun, EDMSampler, mean_straightness, slerp
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.paths import EDM, VP
from penstock.lightning_modules.flow.solvers import Euler
from penstock.lightning_modules.flow_module import FlowModule
from penstock.lightning_modules.rectified_flow import RectifiedFlow

GOLDEN = load_file(Path(__file__).resolve().parents[2] / "golden/rectified_flow_pp/05_samplers.safetensors")
EXACT = {"rtol": 1e-8, "atol": 1e-10}
SOLVERS = {"euler": AnchoredEuler, "heun": AnchoredHeun}
RUNS = [("euler", n, n) for n in (1, 2, 5)] + [("heun", n, (n + 1) // 2) for n in (1, 3, 5)]


def velocity(x, t):
    """The closed-form field of the file in the project's direction of time."""
    a, b, w, p, d = GOLDEN["in/field_params"].tolist()
    s = (1 - t).reshape(-1, *[1] * (x.ndim - 1))
    return -(a * x * torch.cos(w * s) + b * torch.sin(2 * x + p * s) + d)


class Recorder:
    """The field, noting what each call predicts: the data `x + (1 - t) v` and the noise `x - t v`."""

    def __init__(self):
        self.data, self.noise = [], []

    def __call__(self, x, t):
        v, at = velocity(x, t), t.reshape(-1, *[1] * (x.ndim - 1))
        self.data.append(x + (1 - at) * v)
        self.noise.append(x - at * v)
        return v

    def last_of_each_step(self, predictions, steps):
        calls = len(predictions)
        return torch.stack([predictions[min(i if calls == steps else 2 * i + 1, calls - 1)] for i in range(steps)])


def close(actual, name):
    torch.testing.assert_close(actual, GOLDEN[f"out/{name}"], **EXACT, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("update", ["new", "default"])
@pytest.mark.parametrize(("name", "nfe", "steps"), RUNS)
def test_trajectories_predictions_and_straightness(name, nfe, steps, update):
    record = Recorder()
    solution = SOLVERS[name](update)(record, GOLDEN["in/z"], uniform(steps), trajectory=True)
    key, states = f"{name}_{update}_N{nfe}", solution.trajectory
    assert solution.nfe == nfe
    close(states, f"{key}/traj")
    close(mean_straightness(states), f"{key}/straightness_per_sample")
    close(mean_straightness(states).mean(), f"{key}/straightness")
    close(record.last_of_each_step(record.data, steps), f"{key}/x0hat")


@pytest.mark.parametrize("update", ["new", "default"])
def test_custom_grid(update):
    grid = torch.cat([1 - GOLDEN["in/schedule"], torch.ones(1, dtype=torch.float64)])
    close(AnchoredEuler(update)(velocity, GOLDEN["in/z"], grid).x, f"custom_{update}")


@pytest.mark.parametrize(("name", "nfe", "steps"), [("euler", 4, 4), ("heun", 5, 3)])
def test_inversion_and_decoding(name, nfe, steps, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *_, **__: GOLDEN["in/inversion_noise"])
    record = Recorder()
    solution = SOLVERS[name]()(record, GOLDEN["in/image"], uniform(steps).flip(0), trajectory=True)
    key, states = f"invert_{name}_N{nfe}", solution.trajectory
    assert solution.nfe == nfe
    close(states, f"{key}/traj")
    close(record.last_of_each_step(record.noise, steps), f"{key}/z_hat")
    close(AnchoredEuler()(velocity, solution.x, uniform(2)).x, f"{key}/decoded_new_N2")


def test_slerp():
    z = GOLDEN["in/z"]
    close(slerp(z[0], z[1], GOLDEN["in/slerp_weights"]), "slerp")
    half = torch.tensor([0.25])
    torch.testing.assert_close(slerp(z[0], z[0], half)[0], z[0], rtol=1e-6, atol=1e-6)


def test_anchored_is_euler_in_one_step_and_wherever_paths_are_straight():
    z = GOLDEN["in/z"]
    new, default = AnchoredEuler("new"), AnchoredEuler("default")
    torch.testing.assert_close(new(velocity, z, uniform(1)).x, default(velocity, z, uniform(1)).x)
    assert (new(velocity, z, uniform(4)).x - default(velocity, z, uniform(4)).x).abs().max() > 1e-2
    plain = Euler()(velocity, (1 - 1e-5) * z, torch.tensor([1e-5, 0.25, 0.5, 1.0], dtype=torch.float64))
    grid = torch.tensor([0, 0.25, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(default(velocity, z, grid).x, plain.x, rtol=1e-12, atol=1e-12)

    scale, shift = 0.4, 1.5

    def straight(x, t):
        """The exact second flow of x1 = scale x0 + shift."""
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        return (scale - 1) * (x - t * shift) / (1 + t * (scale - 1)) + shift

    ends = [solver(straight, z, uniform(n)).x for n in (1, 2, 7) for solver in (new, default, AnchoredHeun())]
    for end in ends:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=2e-5)
    assert mean_straightness(Euler()(straight, z, uniform(7), trajectory=True).trajectory).max() < 1e-20


def test_straightness_of_the_exact_flow_between_unit_gaussians():
    flow = MixtureFlow(Mixture.gaussian(torch.zeros(1, dtype=torch.float64), 1.0))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    states = Euler()(flow.velocity, x0, uniform(1000), trajectory=True).trajectory
    assert (mean_straightness(states) / x0[:, 0].square()).mean().item() == pytest.approx(0.42865, abs=1e-4)


def test_edm_sampler_counts_calls_and_converges_to_the_exact_map():
    law = Mixture.gaussian(torch.tensor([0.3], dtype=torch.float64), 0.5)
    flow, path = MixtureFlow(law), EDM()
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    exact = 0.3 + 0.5 * (80 * z - 0.3) / (80**2 + 0.25) ** 0.5
    errors = {}
    for steps, calls in ((18, 35), (40, 79), (80, 159)):
        solution = EDMSampler()(flow.velocity, z, uniform(steps))
        assert solution.nfe == calls
        errors[steps] = (solution.x - exact).abs().max().item()
    assert errors[18] < 0.1
    assert errors[80] < errors[40] / 4 < errors[18] / 16
    again = EDMSampler()(MixtureFlow(law, path=path).velocity, z * path.source_std, uniform(80), path=path)
    torch.testing.assert_close(again.x, solution.x, rtol=1e-8, atol=1e-8)


class Field(torch.nn.Module):
    shape, num_classes = (2, 3, 3), 0

    def forward(self, x, t, cond=None):
        return velocity(x, t)


def test_module_hands_the_whole_grid_to_a_solver_with_ends_of_its_own():
    flow: FlowModule = RectifiedFlow(Field(), torch.optim.Adam, solver=AnchoredEuler())
    z = GOLDEN["in/z"]
    torch.testing.assert_close(flow.decode(z, steps=5), GOLDEN["out/euler_new_N5/traj"][-1], **EXACT)
    assert flow.nfe == 5
    made = flow.integrate(z, 3, solver=AnchoredHeun())
    assert flow.nfe == made.nfe == 5
    torch.testing.assert_close(made.x, GOLDEN["out/heun_new_N5/traj"][-1], **EXACT)
    first, again = (flow.encode(z, steps=4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_errors_are_clear():
    z = GOLDEN["in/z"]
    with pytest.raises(ValueError, match="AnchoredEuler steps along the straight line, not along VP"):
        AnchoredEuler()(velocity, z, uniform(2), path=VP())
    with pytest.raises(ValueError, match=r"AnchoredHeun.margin must be in \(0, 1\), got 0"):
        AnchoredHeun(margin=0)
    with pytest.raises(ValueError, match="EDMSampler only runs from noise to data"):
        EDMSampler()(velocity, z, uniform(2).flip(0))
    with pytest.raises(ValueError, match="must strictly ascend"):
        AnchoredEuler(margin=0.6)(velocity, z, uniform(2))
    with pytest.raises(ValueError, match=r"anchors at the noise: start at t=0, not 0.5, or use default"):
        AnchoredEuler()(velocity, z, uniform(2, 0.5, 1.0))
