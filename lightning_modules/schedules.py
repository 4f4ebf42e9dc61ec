"""Learning-rate schedules by optimiser step, for `LRSchedulerCallable` arguments (use `interval: step`)."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from penstock.lightning_modules.errors import UserError


class LinearWarmup(LRScheduler):
    """lr = base * min(n / warmup, 1) in update n = 0, 1, ...: the first update has lr 0 (arXiv 2209.03003 recipe).

    Args:
        optimizer: its learning rates are the base.
        warmup: updates until the base is reached; 0 = constant.
        stop_short: stay at base * (warmup - 1) / warmup, one update short of the base, as the official loop of
            arXiv 2405.20320 does.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 0, stop_short: bool = False):
        if warmup < 0:
            raise UserError(f"model.scheduler.warmup: found {warmup}, expected 0 or more")
        self.warmup, self.stop_short = warmup, stop_short
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Learning rates of the next update, one for each parameter group."""
        last = self.warmup - 1 if self.stop_short else self.warmup
        factor = min(self.last_epoch, last) / self.warmup if self.warmup else 1.0
        return [base * factor for base in self.base_lrs]


class WarmupCosine(LRScheduler):
    """Linear warm-up, then half a cosine down to `floor` (arXiv 1608.03983 eq. 5, one cycle).

    In update n: n / warmup before `warmup`; floor + (1 - floor) (1 + cos(pi (n - warmup) / (total - warmup))) / 2 up to
    `total`; floor after it; all times the base.

    Args:
        optimizer: its learning rates are the base.
        total: updates until `floor` is reached.
        warmup: updates until the base is reached.
        floor: last learning rate as a fraction of the base, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, total: int, warmup: int = 0, floor: float = 0.0):
        if not 0 <= warmup < total:
            raise UserError(f"model.scheduler.total: found {total} with warmup={warmup}, expected 0 <= warmup < total")
        if not 0 <= floor <= 1:
            raise UserError(f"model.scheduler.floor: found {floor}, expected a number in [0, 1]")
        self.total, self.warmup, self.floor = total, warmup, floor
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Learning rates of the next update, one for each parameter group."""
        n = self.last_epoch
        if n < self.warmup:
            factor = n / self.warmup
        else:
            phase = min((n - self.warmup) / (self.total - self.warmup), 1.0)
            factor = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * phase)) / 2
        return [base * factor for base in self.base_lrs]


class WarmupSteps(LRScheduler):
    """Linear warm-up from a part of the base, then steps down, as detectors are trained (arXiv 2005.03101 code).

    In update n: start + (1 - start) n / warmup before `warmup`; else `factor` to the power of how many of `at` n has
    reached; all times the base.

    Args:
        optimizer: its learning rates are the base.
        at: updates at which the rate falls, ascending.
        factor: of each fall, in (0, 1].
        warmup: updates until the base is reached.
        start: first learning rate as a fraction of the base, in [0, 1].
    """

    def __init__(
        self, optimizer: Optimizer, at: list[int], factor: float = 0.1, warmup: int = 500, start: float = 1 / 3
    ):
        if warmup < 0 or at != sorted(at) or min(at, default=warmup) < warmup:
            raise UserError(f"model.scheduler.at: found {at} with warmup={warmup}, expected ascending numbers after it")
        if not 0 < factor <= 1:
            raise UserError(f"model.scheduler.factor: found {factor}, expected a number in (0, 1]")
        if not 0 <= start <= 1:
            raise UserError(f"model.scheduler.start: found {start}, expected a number in [0, 1]")
        self.at, self.factor, self.warmup, self.start = at, factor, warmup, start
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Learning rates of the next update, one for each parameter group."""
        n = self.last_epoch
        if n < self.warmup:
            factor = self.start + (1 - self.start) * n / self.warmup
        else:
            factor = self.factor ** sum(n >= step for step in self.at)
        return [base * factor for base in self.base_lrs]


class WarmupPolynomial(LRScheduler):
    """Down to 0 along a power, with a linear warm-up, as segmenters are trained (arXiv 1606.00915 section 4.1.3).

    In update n: (1 - n / total)^power, before `warmup` also times start + (1 - start) n / warmup; all times the base.

    Args:
        optimizer: its learning rates are the base.
        total: updates until 0 is reached.
        warmup: updates of the warm-up.
        power: 1 is a straight line.
        start: first factor of the warm-up, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, total: int, warmup: int = 0, power: float = 1.0, start: float = 1e-6):
        if not 0 <= warmup < total:
            raise UserError(f"model.scheduler.total: found {total} with warmup={warmup}, expected 0 <= warmup < total")
        if power <= 0:
            raise UserError(f"model.scheduler.power: found {power}, expected a number above 0")
        if not 0 <= start <= 1:
            raise UserError(f"model.scheduler.start: found {start}, expected a number in [0, 1]")
        self.total, self.warmup, self.power, self.start = total, warmup, power, start
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Learning rates of the next update, one for each parameter group."""
        n = self.last_epoch
        factor = max(1 - n / self.total, 0.0) ** self.power
        if n < self.warmup:
            factor *= self.start + (1 - self.start) * n / self.warmup
        return [base * factor for base in self.base_lrs]
