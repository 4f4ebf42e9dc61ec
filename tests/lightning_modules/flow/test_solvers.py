"""Solvers: convergence orders, published figures, marginals, grids and errors (sections 8 of the two specs)."""

import math

import pytest
import torch
from scipy import stats

from penstock.lightning_modules.flow import grids
from penstock.lightning_modules.flow.oracle import Mixture, MixtureFlow
from penstock.lightning_modules.flow.paths import EDM, VE, VP, Cosine, Linear, Path, SubVP
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

TWO_MODES = Mixture(
    torch.tensor([[-2.0], [1.0]], dtype=torch.float64),
    torch.tensor([0.3, 0.3], dtype=torch.float64),
    torch.tensor([0.4, 0.6], dtype=torch.float64),
)
ORDERS = [(Euler(), 1), (Heun(), 2), (DDIM(), 1), (DPMSolverPP2M(), 2), (EDMHeun(), 2)]
PATHS = [Linear(), Cosine(), VP(), SubVP(), VE(sigma_max=20.0), EDM(sigma_max=20.0)]


def points(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def gaussian(mean, std, path=None):
    law = Mixture.gaussian(torch.tensor([mean], dtype=torch.float64), std)
    return MixtureFlow(law, path=path or Linear())


@pytest.mark.parametrize("forward", [True, False], ids=["generate", "encode"])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("solver", "order"), ORDERS, ids=lambda s: type(s).__name__)
def test_convergence_order_against_the_exact_gaussian_map(solver, order, path, forward):
    flow = gaussian(0.7, 0.4, path)
    ends = path.time_at(torch.tensor([-1.5, 2.0], dtype=torch.float64))
    if not forward:
        ends = ends.flip(0)
    x = points(-1.0, 0.2, 1.5) * 3
    exact = flow.flow_map(x, ends[:1].expand(3), ends[1:].expand(3))
    errors = []
    for steps in (80, 160):
        grid = grids.uniform_half_log_snr(steps, path, *ends.tolist())
        solution = solver(flow.velocity, x, grid, path=path)
        errors.append((solution.x - exact).abs().max().item())
        assert solution.nfe == steps * (1 if order == 1 or isinstance(solver, DPMSolverPP2M) else 2)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("forward", [True, False], ids=["generate", "encode"])
@pytest.mark.parametrize(
    ("solver", "order"), [(Euler(), 1), (Heun(), 2), (Midpoint(), 2)], ids=lambda s: type(s).__name__
)
def test_convergence_order_on_a_general_equation(solver, order, forward):
    """dx/dt = x^2 cos(3t): 1/x(t) = 1/x(0) - sin(3t)/3. (For a Gaussian flow the midpoint rule happens to be cubic.)"""
    x0 = points(-1.0, 0.2, 0.9)
    x1 = 1 / (1 / x0 - math.sin(3.0) / 3)
    start, exact = (x0, x1) if forward else (x1, x0)
    errors = []
    for steps in (400, 800):
        grid = grids.uniform(steps) if forward else grids.uniform(steps).flip(0)
        solution = solver(lambda x, t: x.square() * torch.cos(3 * t[:, None]), start, grid)
        errors.append((solution.x - exact).abs().max().item())
        assert solution.nfe == steps * order
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_published_orders_vp():
    """Diffusion principles section 8.3: errors against a fine solution, uniform log-SNR grid, our t from 0 to 0.99."""
    path = VP()
    flow = MixtureFlow(TWO_MODES, path=path)
    x = points(-1.5, -0.2, 0.3, 1.1)
    fine = RK45(1e-10, 1e-10)(flow.velocity, x, torch.tensor([0.0, 0.99], dtype=torch.float64)).x
    figures = {
        DDIM(): (9.3e-2, 4.7e-2, 2.4e-2, 1.2e-2, 5.9e-3),
        DPMSolverPP2M(): (2.1e-2, 9.4e-3, 2.8e-3, 7.6e-4, 2.0e-4),
    }
    for solver, expected in figures.items():
        for steps, value in zip((20, 40, 80, 160, 320), expected):
            grid = grids.uniform_half_log_snr(steps, path, 0.0, 0.99)
            error = (solver(flow.velocity, x, grid, path=path).x - fine).abs().max().item()
            assert error == pytest.approx(value, rel=0.04)


def test_published_orders_edm():
    """Diffusion principles section 8.4: Karras grid from 80 down to 0."""
    path = EDM()
    flow = MixtureFlow(TWO_MODES, path=path)
    x = 80 * points(-1, -0.1, 0.2, 0.9)
    fine = RK45(1e-10, 1e-10)(flow.velocity, x, torch.tensor([0.0, 1.0], dtype=torch.float64)).x
    figures = {Euler(): (9.0e-2, 4.3e-2, 2.1e-2, 1.0e-2, 5.1e-3), EDMHeun(): (3.6e-2, 6.8e-3, 1.5e-3, 3.6e-4, 8.7e-5)}
    for solver, expected in figures.items():
        for steps, value in zip((18, 36, 72, 144, 288), expected):
            solution = solver(flow.velocity, x, grids.karras(steps, path), path=path)
            assert (solution.x - fine).abs().max().item() == pytest.approx(value, rel=0.05)
            assert solution.nfe == (steps if isinstance(solver, Euler) else 2 * steps - 1)


def test_edm_heun_is_the_same_sampler_on_every_path():
    """In y = x / alpha against sigma / alpha all paths are one: same levels, same end."""
    ends = []
    for path in (Linear(), VP(), EDM()):
        flow = MixtureFlow(TWO_MODES, path=path)
        grid = grids.karras(30, path, sigma_max=40.0)
        alpha = path.alpha(grid[:1])
        ends.append(EDMHeun()(flow.velocity, 40 * points(-1, 0.1, 0.9) * alpha, grid[:-1], path=path).x / 1)
        ends[-1] = ends[-1] / path.alpha(grid[-2:-1])
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(ends[1], ends[2], rtol=0, atol=1e-9)


def test_euler_on_the_linear_path_is_ddim():
    flow = MixtureFlow(TWO_MODES)
    x = points(-1.5, -0.2, 0.3, 1.1)
    for grid in (grids.uniform(7), torch.tensor([0.0, 0.1, 0.35, 0.9, 1.0]), grids.uniform(5).flip(0)):
        euler, ddim = (s(flow.velocity, x, grid, trajectory=True).trajectory for s in (Euler(), DDIM()))
        torch.testing.assert_close(euler, ddim, rtol=0, atol=1e-12)


class _Discrete(Path):
    """Two times of a discrete variance-preserving chain."""

    def __init__(self, noisy: float, clean: float):
        self.noisy, self.clean = noisy, clean

    def alpha(self, t):
        return torch.where(t < 0.5, t.new_tensor(self.noisy), t.new_tensor(self.clean))

    def sigma(self, t):
        return (1 - self.alpha(t).square()).sqrt()

    def d_alpha(self, t):
        return torch.ones_like(t)

    def d_sigma(self, t):
        return -torch.ones_like(t)

    def time_at(self, half_log_snr):
        raise NotImplementedError


def test_ddim_eta_one_has_the_ancestral_variance():
    """Diffusion principles section 8.5: linear betas, n = 500, variance 0.0100513."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    expected = (betas[500] * (1 - bar[499]) / (1 - bar[500])).item()
    assert expected == pytest.approx(0.0100513, abs=5e-8)
    path = _Discrete(bar[500].sqrt().item(), bar[499].sqrt().item())
    x = torch.zeros(4, 1, dtype=torch.float64)
    out = DDIM(eta=1.0)(lambda x, t: x, x, grids.uniform(1), path=path, generator=torch.Generator().manual_seed(0)).x
    noise = torch.randn(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, expected**0.5 * noise, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("std", "figures"),
    [
        (1.0, (0, 0.5, 0.72, 0.85082, 0.92270, 0.96061, 0.98723, 0.99872)),
        (0.5, (0, 0.2, 0.34054, 0.41478, 0.45568, 0.47736, 0.49265, 0.49926)),
    ],
)
def test_euler_std_figures(std, figures):
    """Rectified flow section 8, rows 2 and 3; the map is linear, so one point tells the standard deviation."""
    flow = gaussian(0.0, std)
    for steps, value in zip((1, 2, 4, 8, 16, 32, 100, 1000), figures):
        out = Euler()(flow.velocity, points(1.0), grids.uniform(steps)).x.item()
        assert out == pytest.approx(value, abs=6e-6)


def test_euler_std_on_the_compressed_clock():
    """Rectified flow section 8, row 5, and the network times of its section 5."""
    flow = gaussian(0.0, 1.0)
    seen = []

    def velocity(x, t):
        seen.append(t[0].item())
        return flow.velocity(x, t)

    for steps, value in ((2, 0.5005), (4, 0.72076), (8, 0.85170)):
        seen.clear()
        out = Euler()(grids.compressed(velocity, 1e-3), points(1.0), grids.uniform(steps)).x.item()
        assert out == pytest.approx(value, abs=6e-6)
        assert seen == pytest.approx([i / steps * (1 - 1e-3) + 1e-3 for i in range(steps)], abs=1e-15)


def test_one_euler_step_lands_on_the_data_mean():
    flow = MixtureFlow(TWO_MODES)
    out = Euler()(flow.velocity, points(-3, 0, 4), grids.uniform(1)).x
    torch.testing.assert_close(out, torch.full_like(out, 0.4 * -2 + 0.6))


def test_straight_velocity_needs_one_step():
    """Rectified flow section 8, row 7: the exact 2-rectified flow."""
    m, s = 0.3, 0.5

    def velocity(x, t):
        t = t[:, None]
        return m + (s - 1) * (x - t * m) / (1 - t + t * s)

    x = points(-1.0, 0.4, 2.0)
    for steps in (1, 1000):
        out = Euler()(velocity, x, grids.uniform(steps)).x
        torch.testing.assert_close(out, m + s * x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torchdiffeq", "scipy"])
def test_rk45_forward_reverse_and_counting(backend):
    """Rectified flow section 8, row 6; the velocity is never asked outside of the grid."""
    flow = gaussian(0.3, 0.5)
    seen = []

    def velocity(x, t):
        seen.append(t[0].item())
        assert t.shape == (5,)
        return flow.velocity(x, t)

    x = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = RK45(backend=backend)(velocity, x, torch.tensor([0.0, 1.0]))
    assert there.nfe == len(seen)
    assert 0 <= min(seen) <= max(seen) <= 1
    torch.testing.assert_close(there.x, 0.3 + 0.5 * x, rtol=0, atol=1e-4)
    back = RK45(backend=backend)(velocity, there.x, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(back.x, x, rtol=0, atol=1e-4)
    assert RK45(1e-8, 1e-8, backend)(velocity, x, grids.uniform(1)).nfe > there.nfe


def test_rk45_backends_agree_and_scipy_reports_failure():
    flow = MixtureFlow(TWO_MODES)
    x, grid = points(-1.5, -0.2, 0.3, 1.1), torch.linspace(0.9, 0.1, 4, dtype=torch.float64)
    ours, scipys = (
        RK45(1e-9, 1e-9, backend)(flow.velocity, x, grid, trajectory=True).trajectory
        for backend in ("torchdiffeq", "scipy")
    )
    torch.testing.assert_close(ours, scipys, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="RK45 stopped at t="):
        RK45(backend="scipy")(lambda x, t: x**4, points(5.0), torch.tensor([0.0, 1.0]))


def test_rk45_error_follows_its_tolerance():
    flow = MixtureFlow(TWO_MODES)
    x = points(-1.5, -0.2, 0.3, 1.1)
    fine = RK45(1e-11, 1e-11)(flow.velocity, x, torch.tensor([0.0, 0.99])).x
    errors = [
        (RK45(tol, tol)(flow.velocity, x, torch.tensor([0.0, 0.99])).x - fine).abs().max() for tol in (1e-4, 1e-7)
    ]
    assert errors[0] < 3e-3
    assert errors[1] < 3e-6


@pytest.mark.parametrize(
    "solver",
    [s for s, _ in ORDERS] + [Midpoint(), RK45(1e-8, 1e-8), RK45(1e-8, 1e-8, "scipy"), EulerMaruyama("sigma")],
    ids=repr,
)
def test_trajectory_has_a_state_for_every_time(solver):
    flow = gaussian(0.3, 0.5)
    x = points(-1.0, 0.5)
    grid = torch.linspace(0.2, 0.8, 5, dtype=torch.float64)
    whole = solver(flow.velocity, x, grid, trajectory=True, generator=torch.Generator().manual_seed(0))
    last = solver(flow.velocity, x, grid, generator=torch.Generator().manual_seed(0))
    assert whole.trajectory.shape == (5, 2, 1)
    assert torch.equal(whole.trajectory[0], x)
    assert torch.equal(whole.trajectory[-1], whole.x)
    torch.testing.assert_close(whole.x, last.x, rtol=0, atol=1e-6)
    assert last.trajectory is None
    if isinstance(solver, RK45):
        exact = [flow.flow_map(x, grid[:1].expand(2), grid[i : i + 1].expand(2)) for i in range(5)]
        torch.testing.assert_close(whole.trajectory, torch.stack(exact), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("path", [Linear(), VP(), EDM(sigma_max=20.0)], ids=lambda p: type(p).__name__)
def test_sde_keeps_the_gaussian_marginals(path, scale):
    """Diffusion principles section 8.8: any diffusion keeps the variance, in both directions, within 1 %."""
    ends = path.time_at(torch.tensor([-2.0, 2.5], dtype=torch.float64))
    gen = torch.Generator().manual_seed(4)
    grid = grids.uniform_half_log_snr(1000, path, *ends.tolist())

    def velocity(x, t):
        t = t[:1].double()
        alpha, sigma = path.alpha(t), path.sigma(t)
        drift = path.d_alpha(t) * alpha * 0.25 + path.d_sigma(t) * sigma
        return (drift / (alpha**2 * 0.25 + sigma**2)).to(x.dtype) * x

    for direction in (grid, grid.flip(0)):
        std = (path.alpha(direction) ** 2 * 0.25 + path.sigma(direction) ** 2).sqrt()[[0, -1]].tolist()
        x = torch.randn(25000, generator=gen)
        out = EulerMaruyama("reverse", scale)(velocity, x / x.std() * std[0], direction, path=path, generator=gen).x
        assert out.std().item() == pytest.approx(std[1], rel=0.01)


@pytest.mark.parametrize(
    "diffusion", ["reverse", "sigma", lambda t: 0.8 * (1 - t).sqrt()], ids=["reverse", "sigma", "own"]
)
def test_sde_has_the_mixture_as_its_law(diffusion):
    flow = MixtureFlow(TWO_MODES)
    gen = torch.Generator().manual_seed(1)
    t0 = torch.full((4000,), 0.02, dtype=torch.float64)
    x1, x0 = TWO_MODES.sample(4000, gen), torch.randn(4000, 1, dtype=torch.float64, generator=gen)
    start = Linear().interpolate(x0[torch.randperm(4000, generator=gen)], x1, t0)
    out = EulerMaruyama(diffusion)(flow.velocity, start, grids.uniform(400, 0.02, 0.98), generator=gen).x[:, 0].numpy()

    def cdf(x):
        std = math.sqrt(0.98**2 * 0.09 + 0.02**2)
        return 0.4 * stats.norm.cdf(x, -2 * 0.98, std) + 0.6 * stats.norm.cdf(x, 0.98, std)

    assert stats.kstest(out, cdf).pvalue > 0.01


def test_euler_maruyama_weak_order_one():
    """The update is linear for a Gaussian: variance error halves when the step halves."""
    flow = gaussian(0.0, 0.5)
    exact = 0.81 * 0.25 + 0.01
    errors = []
    for steps in (10, 20, 40):
        gain, variance = 1.0, 0.01 * 0.25 + 0.81
        grid = grids.uniform(steps, 0.1, 0.9)
        for i in range(steps):
            pair = grid[i : i + 2]
            zero, one = (
                EulerMaruyama("reverse")(
                    flow.velocity, points(value), pair, generator=torch.Generator().manual_seed(0)
                ).x.item()
                for value in (0.0, 1.0)
            )
            noise = torch.randn(1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).item()
            gain, spread = one - zero, zero / noise
            variance = gain**2 * variance + spread**2
        errors.append(abs(variance - exact))
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.25)


def test_stochastic_solvers_keep_the_law_and_repeat_with_the_seed():
    path = EDM(sigma_max=20.0)
    flow = gaussian(0.3, 0.5, path)
    grid = grids.karras(200, path, sigma_max=15.0)
    start = 0.3 + math.sqrt(0.25 + 15.0**2) * torch.randn(
        10000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    for solver in (EDMHeun(s_churn=20.0, s_max=10.0), DDIM(eta=1.0), DDIM(eta=0.5)):
        first, second, other = (
            solver(flow.velocity, start, grid, path=path, generator=torch.Generator().manual_seed(s)).x
            for s in (1, 1, 2)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
        assert first.mean().item() == pytest.approx(0.3, abs=0.02)
        assert first.std().item() == pytest.approx(0.5, rel=0.03)


def test_dpm_solver_starts_at_pure_noise_and_ends_at_clean_data():
    flow = MixtureFlow(TWO_MODES)
    x = points(-1.5, -0.2, 0.3, 1.1)
    exact = RK45(1e-9, 1e-9)(flow.velocity, x, torch.tensor([0.0, 1.0])).x
    errors = [(DPMSolverPP2M()(flow.velocity, x, grids.uniform(n)).x - exact).abs().max().item() for n in (10, 50, 400)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 5e-3
    one = DPMSolverPP2M()(flow.velocity, x, grids.uniform(1)).x
    torch.testing.assert_close(one, Euler()(flow.velocity, x, grids.uniform(1)).x)


def test_single_precision_times_reach_the_velocity():
    def velocity(x, t):
        assert t.dtype == torch.float32
        assert t.shape == (2,)
        return x

    for solver in (Euler(), RK45()):
        assert solver(velocity, torch.ones(2, 3), grids.uniform(2)).x.dtype == torch.float32


def test_grids():
    torch.testing.assert_close(grids.uniform(4), torch.tensor([0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    lam = VP().half_log_snr(grids.uniform_half_log_snr(9, VP(), 0.05, 0.98))
    torch.testing.assert_close(lam.diff(), lam.diff().mean().expand(9), rtol=1e-8, atol=0)
    path = EDM()
    sigma = path.sigma(grids.karras(18, path))
    place = torch.linspace(0, 1, 18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + place * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma[:-1], expected, rtol=1e-9, atol=1e-12)
    assert sigma[-1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: Euler()(f, x, torch.tensor([0.5])), "at least two times"),
        (lambda f, x: RK45()(f, x, torch.tensor([0.1, 0.1])), "strictly ascend"),
        (lambda f, x: Heun()(f, x, torch.tensor([0.0, 0.5, 0.2])), "strictly ascend"),
        (lambda f, x: Euler()(f, x, torch.tensor([0.0, 2.0])), r"lie in \[0, 1\]"),
        (lambda f, x: DDIM(eta=1.0)(f, x, grids.uniform(4).flip(0)), "ascending grid"),
        (lambda f, x: DPMSolverPP2M()(f, x, grids.uniform(4).flip(0)), "before t=1"),
        (lambda f, x: EDMHeun()(f, x, grids.uniform(4)), "alpha > 0"),
        (lambda f, x: EDMHeun(s_churn=1.0)(f, x, grids.uniform(4, 0.9, 0.1)), "s_churn=0"),
        (lambda f, x: EDMHeun(s_churn=9.0)(f, x, grids.uniform(4), path=EDM()), "s_max"),
        (lambda f, x: EulerMaruyama()(f, x, grids.uniform(4)), "no finite drift"),
        (lambda f, x: EulerMaruyama("sigma")(f, x, grids.uniform(4).flip(0)), "no finite drift"),
        (lambda f, x: DDIM()(f, x, grids.uniform(4).flip(0), path=VP()), "cannot be differentiated at t=1"),
        (lambda f, x: grids.uniform(0), "at least 1 step"),
        (lambda f, x: grids.uniform(3, 0.5, 0.5), "different ends"),
        (lambda f, x: grids.uniform_half_log_snr(3, Linear(), 0.0, 0.9), "log-SNR is infinite"),
        (lambda f, x: grids.karras(3, EDM(), sigma_max=100.0), "more noise"),
        (lambda f, x: grids.karras(3, EDM(), sigma_max=1.0, sigma_min=2.0), "sigma_min < sigma_max"),
        (lambda f, x: DDIM(eta=2.0), "eta"),
        (lambda f, x: EDMHeun(s_churn=-1.0), "s_churn"),
    ],
)
def test_errors_name_the_cause(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda x, t: -x, torch.ones(2, 1))
