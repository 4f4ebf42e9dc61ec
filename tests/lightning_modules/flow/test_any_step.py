"""Any-step targets and samplers on Gaussians, whose flow map is known (t = 0 noise, t = 1 data)."""

import pytest
import torch

from penstock.lightning_modules.flow.any_step import displacement, ends, mix, rcgm_target, time_weight
from penstock.lightning_modules.flow.any_step_sampler import AnyStepSampler

M, S = 2.0, 0.5


def spread(t):
    return ((1 - t) ** 2 + t**2 * S**2) ** 0.5


def velocity(x, t):
    """Of the flow from N(0, 1) to N(2, 0.25)."""
    return M + (t * S**2 - (1 - t)) / spread(t) ** 2 * (x - t * M)


def average(x, t, r):
    """Exact average velocity from t to r, the velocity at r = t; times as wide as x or scalar."""
    t, r = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in (t, r))
    there = r * M + spread(r) / spread(t) * (x - t * M)
    return torch.where(r > t, (there - x) / torch.where(r > t, r - t, 1), velocity(x, t))


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_ends_are_a_decomposition():
    generator = torch.Generator().manual_seed(0)
    x, u = (torch.randn(6, 3, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.4, 2.0])
    source, data = ends(x, u, t)
    torch.testing.assert_close(mix(source, data, t), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(data - source, u, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("t", "r", "expected"), [(0.1, 1.0, -1.18e-3), (0.5, 0.8, -3.15e-3)])
def test_exact_average_velocities_leave_a_residual_of_the_order_of_the_step(t, r, expected):
    x, t, r = column(1.3)[:, None], column(t), column(r)
    u, v = average(x, t, r), velocity(x, t[:, None])

    def residual(order, step=0.01):
        return float(rcgm_target(average, u, v, x, t, r, order, step) - u)

    found = residual(2)
    assert found == pytest.approx(expected, rel=5e-3)
    assert [residual(1), residual(3)] == pytest.approx([found, found], abs=1e-9)
    assert residual(2, 1e-3) == pytest.approx(found / 10, rel=0.05)
    assert residual(2, 0) == pytest.approx(0, abs=1e-12)


def test_score_from_velocity():
    t, x = 0.4, 1.3
    assert velocity(torch.tensor(x), torch.tensor(t)) == pytest.approx(1.375)
    score = -(x - t * M) / spread(t) ** 2
    assert score == pytest.approx(-1.25)
    assert -(x - t * 1.375) / (1 - t) == pytest.approx(score)


def test_target_at_and_near_equal_times_is_finite_and_flow_matching():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).half().float()
    t = torch.tensor([0.0, 0.3, 0.999, 1.0, 0.5])
    r = t + torch.tensor([0.0, 1e-7, 0.0, 0.0, 0.009])
    u, v = torch.zeros(5, 2), torch.full((5, 2), 0.25)
    for order, step in ((1, 0.01), (2, 0.01), (4, 0.01), (2, 0), (3, 0)):
        target = rcgm_target(lambda x, t, r: v, u, v, x, t, r, order, step)
        torch.testing.assert_close(target[[0, 2, 3]], v[[0, 2, 3]], rtol=0, atol=0)
        assert target.isfinite().all()
    for order, step, least in ((0, 0.01, 1), (1, 0, 2)):
        with pytest.raises(ValueError, match=f"order {order} with step {step}, expected at least {least}"):
            rcgm_target(average, u, v, x, t, r, order, step)


def test_target_without_a_first_step_is_half_of_each_of_two_steps():
    x, t, r = column(1.3, -0.4)[:, None], column(0.2, 0.0), column(0.9, 1.0)
    middle = (t + r) / 2

    def wrong(x, t, r):
        return 0.1 * average(x, t, r) + 0.2

    there = x + (middle - t)[:, None] * wrong(x, t, middle)
    expected = (wrong(x, t, middle) + wrong(there, middle, r)) / 2
    found = rcgm_target(wrong, expected + 0.3, torch.full_like(x, 9.0), x, t, r, 2, 0)
    torch.testing.assert_close(found, expected)


def test_displacement_of_exact_averages_is_the_flow_map():
    x, t, r = column(1.3, -0.4)[:, None], column(0.2, 0.0), column(0.9, 1.0)
    for order in (1, 2, 5):
        torch.testing.assert_close(displacement(average, x, t, r, order), (r - t)[:, None] * average(x, t, r))


def test_time_weights():
    r = column(0.0, 0.05, 0.5, 1.0)
    torch.testing.assert_close(
        time_weight(torch.zeros_like(r), r), column(4.0777, 3.5257, 1.7265, 1.0), rtol=0, atol=5e-5
    )


# ------------------------------------------------------------------ samplers


def drawn(sampler, steps, u=average, n=200_000):
    x0 = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x0, sampler(u, x0, steps, generator=torch.Generator().manual_seed(1))[-1]


def test_one_step_needs_the_average_velocity():
    _, plain = drawn(AnyStepSampler("mul", 0.0), 1)
    _, whole = drawn(AnyStepSampler("few", 0.0), 1)
    assert (float(plain.mean()), float(plain.std())) == pytest.approx((2.0, 0.0), abs=5e-3)
    assert (float(whole.mean()), float(whole.std())) == pytest.approx((2.0, 0.5), abs=5e-3)


def test_steps_of_exact_average_velocities_compose():
    x0, one = drawn(AnyStepSampler("few", 0.0), 1)
    two = AnyStepSampler("any", 0.0, gaps=(0.0, 0.6))(average, x0, 2)[-1]
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("noise", "deviation"), [(1.0, 0.5), (0.0, 0.632)])
def test_a_jump_to_the_data_needs_new_noise(noise, deviation):
    _, found = drawn(AnyStepSampler("few", noise, gaps=(0.0, 0.6)), 2)
    assert float(found.std()) == pytest.approx(deviation, abs=3e-3)
    assert float(found.mean()) == pytest.approx(2.0, abs=5e-3)


def test_many_small_steps_follow_the_flow():
    x0, found = drawn(AnyStepSampler("mul", 0.0, kumaraswamy=(1.17, 0.8, 1.1)), 400, n=1000)
    torch.testing.assert_close(found, M + S * x0, rtol=0, atol=2e-2)


def test_grids():
    def grid(steps, *gaps):
        return AnyStepSampler(gaps=gaps or (0.0, 0.0)).times(steps).tolist()

    assert grid(1) == [0, 1]
    assert grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert grid(2, 0.001, 0.6) == pytest.approx([0.001, 0.4, 1])
    assert grid(4, 0.001, 0.5) == pytest.approx([0.001, 0.1673, 0.3337, 0.5, 1], abs=5e-5)
    with pytest.raises(ValueError, match="at least 1 step"):
        grid(0)


def test_extrapolation_starts_with_the_third_step():
    x0 = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    plain, more = (AnyStepSampler("any", 0.0, k)(average, x0, 4) for k in (0.0, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], more[:3]))
    assert not torch.equal(plain[3], more[3])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"style": "one"}, "style 'one', expected few, any or mul"),
        ({"noise": 1.5}, "noise 1.5"),
        ({"extrapolation": -1.0}, "extrapolation -1.0"),
        ({"gaps": (0.5, 0.5)}, "gaps"),
        ({"kumaraswamy": (0.0, 1.0, 1.0)}, "kumaraswamy"),
    ],
)
def test_options_out_of_range(options, line):
    with pytest.raises(ValueError, match=line):
        AnyStepSampler(**options)
