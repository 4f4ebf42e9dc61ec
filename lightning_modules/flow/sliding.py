"""Jacobi iteration in a window that slides: tokens leave it at the front as they come to stand still."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.lightning_modules.flow.inverse import Agreed, Laws, Start, Told, Trace, check_least, guess, prepared


@dataclass(frozen=True)
class Sliding:
    """Sweeps `u' = mu(u) + sigma(u) z` of the `window` tokens from the first that may still move.

    A token stands still where `mean((u' - u)^2) < tolerance`, over its channels, in every sample. Tokens before the
    first that does not are done, and so is that one, whose law was read from them: at least one token leaves in a
    sweep, after k sweeps the first k are exact (arXiv 2511.20462), and as many as left enter at the back. The cache
    keeps what is done, so that a sweep costs the window alone, and no sweep is spent on tokens whose past is unknown.

    Args:
        window: Tokens of a sweep, at least 1: with all tokens of a sample the fewest sweeps, with few the least work.
        tolerance: Of squared values of a token; 0 or more. In float32 below about 1e-11 rounding keeps tokens moving.
        max_sweeps: The most that a token takes, at least 1.
        start: Of a token: its noise, zeros, or the token one frame earlier; `frame` is noise in the first frame.

    Raises:
        ValueError: a number below its least.
    """

    window: int = 128
    tolerance: float = 1e-6
    max_sweeps: int = 1000
    start: Start = "frame"

    def __post_init__(self):
        check_least(self, window=1, tolerance=0, max_sweeps=1)

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
        """See `Inverse`; the trace has one chunk, and its residual is the largest of tokens that were left as done."""
        x, place = prepared(laws, first, z, known)
        ends, worst, cut = [place], z.new_zeros(()), False
        while place < z.shape[1]:
            end = min(place + self.window, z.shape[1])
            guess(x, ends[-1], end, frame, self.start)
            ends.append(end)
            mu, sigma = laws(x[:, place:end], place)
            new = mu + sigma * z[:, place:end]
            moved = (new - x[:, place + 1 : end + 1]).square().mean(2).amax(0)
            x[:, place + 1 : end + 1] = new
            still = moved < self.tolerance
            still = still if agreed is None else agreed(still)
            gone = min(int(still.long().cumprod(0).sum()) + 1, end - place)
            if (over := self._old(ends) - place) > gone:
                gone, cut = over, self.tolerance > 0
            if gone > 1:
                worst = torch.maximum(worst, moved[: gone - 1].amax())
            if told is not None:
                told(len(z) * gone, 1)
            place += gone
        finite = bool(x[:, -1].isfinite().all())
        return x[:, 1:], Trace([len(ends) - 1], [float(worst) if finite else math.nan], int(cut))

    def _old(self, ends: list[int]) -> int:
        """End of the tokens that have taken `max_sweeps`."""
        return ends[-self.max_sweeps] if len(ends) > self.max_sweeps else 0
