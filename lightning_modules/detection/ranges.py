"""Refusals of numbers out of range, by their key."""

from penstock.lightning_modules.errors import UserError


def at_least(least: float, **values: float) -> None:
    """Refuses a value below `least`, or one that is no number; `__` in a name is a dot of its key.

    Raises:
        UserError: the first.
    """
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"{name.replace('__', '.')}: found {value:g}, expected at least {least:g}")


def above_zero(**values: float) -> None:
    """Refuses a value of 0 or less, or one that is no number, see `at_least`."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name.replace('__', '.')}: found {value:g}, expected a number above 0")


def fractions(**values: float) -> None:
    """Refuses a value outside of [0, 1], see `at_least`."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name.replace('__', '.')}: found {value:g}, expected a number in [0, 1]")
