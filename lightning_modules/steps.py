"""What a number of steps may be in the configuration and on the command line: `8`, or `bellman:8`; imports no torch."""

import re
from dataclasses import dataclass

from penstock.lightning_modules.errors import UserError, did_you_mean

K_MAX = 100
CALLS = "network_calls"  # metric beside those named by steps, where the calls are not known from the steps


@dataclass(frozen=True)
class Bellman:
    """`bellman:K` or `bellman:K/K_max`: the K steps of least local error on a grid of K_max (arXiv 2312.16414).

    Args:
        k: steps.
        k_max: steps of the fine grid that they are chosen from.
    """

    k: int
    k_max: int = K_MAX


def parse_steps(value: int | str, key: str = "steps") -> int | Bellman:
    """A number of equal steps, or a search for the best ones.

    Args:
        value: as the user wrote it.
        key: what errors call it.

    Raises:
        UserError: another word, fewer than 1 step, more than the fine grid has, or a fine grid without any.
    """
    text = str(value)
    if re.fullmatch(r"-?\d+", text):
        if int(text) < 1:
            raise UserError(f"{key}={text}: expected a whole number of 1 or more")
        return int(text)
    word, colon, rest = text.partition(":")
    numbers = re.fullmatch(r"(-?\d+)(?:/(-?\d+))?", rest)
    if word != "bellman" or numbers is None:
        wanted = f"bellman:{rest if numbers else 4}"
        near = f" (did you mean '{wanted}'?)" if colon or did_you_mean(word, ["bellman"]) else ""
        raise UserError(f"{key}={text}: expected a whole number, bellman:K or bellman:K/K_max{near}")
    k, k_max = int(numbers[1]), int(numbers[2] or K_MAX)
    if k_max < 1:
        near = f"bellman:{k if 1 <= k <= K_MAX else 4}"
        raise UserError(f"{key}={text}: found K_max={k_max}, expected a grid of K or more (did you mean '{near}'?)")
    if not 1 <= k <= k_max:
        raise UserError(f"{key}={text}: found K={k}, expected 1 to {k_max}, the steps of the fine grid")
    return Bellman(k, k_max)
