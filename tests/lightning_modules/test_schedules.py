"""Learning-rate schedules."""

import math

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.schedules import LinearWarmup, WarmupCosine, WarmupPolynomial, WarmupSteps


def rates(build, steps):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups)
    schedule = build(optimizer)
    out = []
    for _ in range(steps):
        out.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return out


def test_linear_warmup_starts_at_zero():
    found = rates(lambda o: LinearWarmup(o, 4), 7)
    assert [a for a, _ in found] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [b for _, b in found] == pytest.approx([0.1 * a for a, _ in found])


def test_linear_warmup_that_stops_short():
    found = [a for a, _ in rates(lambda o: LinearWarmup(o, 4, stop_short=True), 6)]
    assert found == [0, 0.25, 0.5, 0.75, 0.75, 0.75]


def test_no_warmup_is_constant():
    assert rates(LinearWarmup, 3) == [[1.0, 0.1]] * 3
    assert rates(lambda o: LinearWarmup(o, stop_short=True), 3) == [[1.0, 0.1]] * 3


def test_cosine_with_warmup():
    found = [a for a, _ in rates(lambda o: WarmupCosine(o, total=10, warmup=2, floor=0.1), 13)]
    expected = [0, 0.5] + [0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(8)] + [0.1] * 3
    assert found == pytest.approx(expected)


def test_steps_with_warmup():
    found = [a for a, _ in rates(lambda o: WarmupSteps(o, at=[5, 7], factor=0.1, warmup=3, start=0.4), 9)]
    assert found == pytest.approx([0.4, 0.6, 0.8, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_polynomial_with_warmup_against_torch(power):
    library = torch.optim.lr_scheduler

    def chained(optimizer):
        rise = library.LinearLR(optimizer, start_factor=0.1, total_iters=3)
        return library.ChainedScheduler([rise, library.PolynomialLR(optimizer, total_iters=10, power=power)])

    found = rates(lambda o: WarmupPolynomial(o, total=10, warmup=3, power=power, start=0.1), 12)
    assert found[0] == pytest.approx([0.1, 0.01])
    assert found == [pytest.approx(row) for row in rates(chained, 12)]
    assert found[10:] == [[0, 0]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 5, "warmup": 5}, "model.scheduler.total"),
        ({"total": 5, "power": 0}, "model.scheduler.power"),
        ({"total": 5, "start": 2}, "model.scheduler.start"),
    ],
)
def test_polynomials_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        rates(lambda o: WarmupPolynomial(o, **options), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": [7, 5]}, "model.scheduler.at"),
        ({"at": [400]}, "model.scheduler.at"),
        ({"at": [600], "factor": 0}, "model.scheduler.factor"),
        ({"at": [600], "start": 2}, "model.scheduler.start"),
    ],
)
def test_steps_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        rates(lambda o: WarmupSteps(o, **options), 1)


def test_resumed_schedule_continues():
    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, WarmupCosine(optimizer, total=10, warmup=2)

    optimizer, schedule = build()
    for _ in range(5):
        optimizer.step()
        schedule.step()
    other_optimizer, other = build()
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    for o, s in ((optimizer, schedule), (other_optimizer, other)):
        o.step()
        s.step()
    assert schedule.get_last_lr() == other.get_last_lr() == [pytest.approx((1 + math.cos(math.pi * 4 / 8)) / 2)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda o: LinearWarmup(o, -1), "model.scheduler.warmup: found -1"),
        (lambda o: WarmupCosine(o, 5, 5), "model.scheduler.total: found 5 with warmup=5"),
        (lambda o: WarmupCosine(o, 5, floor=2.0), r"model.scheduler.floor: found 2.0"),
    ],
)
def test_errors_are_clear(build, message):
    with pytest.raises(UserError, match=message):
        rates(build, 1)


def test_usable_as_scheduler_callable():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scheduler", type=LRSchedulerCallable)
    path = "penstock.lightning_modules.schedules.LinearWarmup"
    config = parser.parse_object({"scheduler": {"class_path": path, "init_args": {"warmup": 2}}})
    found = rates(parser.instantiate(config).scheduler, 3)
    assert [a for a, _ in found] == [0, 0.5, 1]
