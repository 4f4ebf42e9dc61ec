"""Inverting an autoregressive block: token by token, or many at once by fixed-point iteration.

A block gives the law of token i from those before it, `u_i = mu_i + sigma_i z_i`. Token by token that is exact. Jacobi
iteration puts a guess in the place of all tokens of a chunk and repeats: after k sweeps the first k tokens are exact
(arXiv 2511.20462, 2505.12849).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from penstock.kernels.jacobi import update

Laws = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Told = Callable[[int, int], None]
Agreed = Callable[[Tensor], Tensor]
Start = Literal["noise", "zeros", "frame"]


@dataclass
class Trace:
    """What an inversion took.

    Attributes:
        sweeps: Network calls of each chunk, in order.
        residuals: Relative squared change in the last sweep of each; 0 token by token.
        unfinished: Chunks that stopped at the largest number of sweeps, though they are longer and still moved.
    """

    sweeps: list[int] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    unfinished: int = 0

    @property
    def calls(self) -> int:
        """Network calls."""
        return sum(self.sweeps)


class Inverse(Protocol):
    """Carries noise to data through one block."""

    def __call__(
        self,
        laws: Laws,
        first: Tensor,
        z: Tensor,
        frame: int,
        known: Tensor | None = None,
        told: Told | None = None,
        agreed: Agreed | None = None,
    ) -> tuple[Tensor, Trace]:
        """Tokens `(B, D, C)` of noise `z`.

        Args:
            laws: `mu` and `sigma` of the tokens from a place on, given those before them.
            first: What stands before the first token `(B, 1, C)`.
            z: Noise `(B, D, C)`.
            frame: Tokens of a frame.
            known: Tokens `(B, K, C)`, K <= D, that the sequence begins with, whatever their noise.
            told: Gets the number of tokens of all sequences, and of the calls they took, whenever some are done.
            agreed: Makes of "this rank is done", a bool tensor, that all are, where ranks have to make the same calls.
        """
        ...


def prepared(laws: Laws, first: Tensor, z: Tensor, known: Tensor | None) -> tuple[Tensor, int]:
    """The sequence `[first; z]` `(B, 1 + D, C)` with the known tokens in it and in the cache, and their number.

    Raises:
        ValueError: more known tokens than there are, or of another size.
    """
    sequence = torch.cat([first, z], 1)
    if known is None or not known.shape[1]:
        return sequence, 0
    number = known.shape[1]
    if number > z.shape[1] or known.shape[::2] != z.shape[::2]:
        raise ValueError(f"known tokens {tuple(known.shape)}, expected at most those of {tuple(z.shape)}")
    sequence[:, 1 : number + 1] = known
    if number < z.shape[1]:
        laws(sequence[:, :number], 0)
    return sequence, number


def guess(x: Tensor, place: int, end: int, frame: int, start: Start) -> None:
    """Puts a guess of the tokens `[place, end)` into `x`, which holds token i at 1 + i, and noise where none is known.

    Args:
        x: The start token and tokens `(B, 1 + D, C)`.
        place: First token.
        end: After the last one.
        frame: Tokens of a frame.
        start: `noise` leaves what is there, `zeros`, or what is one frame earlier, again and again.
    """
    if start == "zeros":
        x[:, place + 1 : end + 1] = 0
    elif start == "frame" and frame <= place < end:
        source = torch.arange(place, end, device=x.device)
        source = source - frame * ((source - place) // frame + 1)
        x[:, place + 1 : end + 1] = x[:, source + 1]


def check_least(inverse: object, **least: float) -> None:
    """Refuses a number of an inverse, unless it is None, that is below its least.

    Raises:
        ValueError: the number's name, what it is and what is expected.
    """
    for name, bound in least.items():
        value = getattr(inverse, name)
        if value is not None and value < bound:
            raise ValueError(f"{type(inverse).__name__}: {name}={value}, expected at least {bound}")


class Sequential:
    """Token by token: D network calls."""

    def __call__(
        self,
        laws: Laws,
        first: Tensor,
        z: Tensor,
        frame: int,
        known: Tensor | None = None,
        told: Told | None = None,
        agreed: Agreed | None = None,
    ) -> tuple[Tensor, Trace]:
        """See `Inverse`."""
        x, start = prepared(laws, first, z, known)
        for i in range(start, z.shape[1]):
            mu, sigma = laws(x[:, i : i + 1], i)
            x[:, i + 1 : i + 2] = mu + sigma * z[:, i : i + 1]
            if told is not None:
                told(len(z), 1)
        left = z.shape[1] - start
        return x[:, 1:], Trace([1] * left, [0.0] * left)


@dataclass(frozen=True)
class Jacobi:
    """Chunk by chunk, each swept until it stands still: `mean((u' - u)^2) < tolerance mean(u'^2)`.

    A chunk starts from its noise, from zeros, or from the tokens one frame earlier; what is before it is exact always.
    The first sweep of a chunk takes the last chunk along, so that the cache holds what came out of it, not what went
    into its last sweep.

    GS-Jacobi (arXiv 2505.12849): `chunk` a share of the sequence, `tolerance=0`, few sweeps, `clamp=3`.

    Args:
        chunk: Tokens of a chunk in the first frame, at least 1.
        later: Tokens of a chunk afterwards; None is as many.
        tolerance: Of squared values; 0 sweeps as often as there are tokens.
        max_sweeps: Of a chunk, at least 1.
        start: Of a chunk; `frame` is noise in the first frame.
        clamp: Largest size of an iterate; 0 is none.
        refresh: Whether the cache gets what came out of the last sweep of a chunk.

    Raises:
        ValueError: a number below its least.
    """

    chunk: int = 32
    later: int | None = None
    tolerance: float = 1e-3
    max_sweeps: int = 32
    start: Start = "frame"
    clamp: float = 0.0
    refresh: bool = True

    def __post_init__(self):
        check_least(self, chunk=1, later=1, tolerance=0, max_sweeps=1, clamp=0)

    def __call__(
        self,
        laws: Laws,
        first: Tensor,
        z: Tensor,
        frame: int,
        known: Tensor | None = None,
        told: Told | None = None,
        agreed: Agreed | None = None,
    ) -> tuple[Tensor, Trace]:
        """See `Inverse`."""
        x, place = prepared(laws, first, z, known)
        trace, clean = Trace(), place
        while place < z.shape[1]:
            end = min(place + (self.chunk if place < frame else self.later or self.chunk), z.shape[1])
            guess(x, place, end, frame, self.start)
            sweeps, residual = self._sweep(laws, x, z, clean, place, end, agreed)
            trace.sweeps.append(sweeps)
            trace.residuals.append(residual)
            trace.unfinished += end - place > sweeps and residual >= self.tolerance > 0
            if told is not None:
                told(len(z) * (end - place), sweeps)
            clean, place = place if self.refresh else end, end
        return x[:, 1:], trace

    def _sweep(
        self, laws: Laws, x: Tensor, z: Tensor, clean: int, place: int, end: int, agreed: Agreed | None
    ) -> tuple[int, float]:
        most = min(self.max_sweeps, end - place)
        for sweep in range(1, most + 1):
            from_ = clean if sweep == 1 else place
            mu, sigma = (value[:, place - from_ :] for value in laws(x[:, from_:end], from_))
            residual = update(x[:, place + 1 : end + 1], mu, sigma, z[:, place:end], self.clamp)
            done = residual < self.tolerance
            if sweep == most or bool(done if agreed is None else agreed(done)):
                return sweep, float(residual)
        raise AssertionError
