"""The sliding window on an autoregressive map whose laws are small formulas, with a memory in the place of a cache."""

import math

import pytest
import torch
from token_laws import TokenLaws

from penstock.lightning_modules.autoregressive_module import unfinished
from penstock.lightning_modules.flow.inverse import Jacobi, Sequential
from penstock.lightning_modules.flow.sliding import Sliding

BATCH, FRAME, TOKENS = 3, 4, 24
FIRST = torch.full((BATCH, 1, 1), 0.5).double()


class Laws(TokenLaws):
    """Of this file's size."""

    def __init__(self, strength=0.4):
        super().__init__(BATCH, TOKENS, strength)


def noise(seed=1):
    return torch.randn(BATCH, TOKENS, 1, generator=torch.Generator().manual_seed(seed)).double()


def inverted(inverse, laws=None, z=None, **options):
    return inverse(laws or Laws(), FIRST, noise() if z is None else z, FRAME, **options)


EXACT, _ = inverted(Sequential())


def largest(x):
    return float(x.abs().max())


@pytest.mark.parametrize("start", ["noise", "zeros", "frame"])
@pytest.mark.parametrize("window", [1, 3, 8, 24, 100])
def test_without_tolerance_a_sweep_finishes_one_token_and_all_are_exact(window, start):
    laws = Laws()
    u, trace = inverted(Sliding(window, 0.0, start=start), laws)
    assert largest(u - EXACT) < 1e-12
    assert laws.calls == [(i, min(i + window, TOKENS)) for i in range(TOKENS)]
    assert trace.calls == TOKENS
    assert trace.unfinished == 0


@pytest.mark.parametrize("window", [3, 8, 24])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8, 1e-12])
def test_a_smaller_tolerance_takes_more_sweeps_and_leaves_a_smaller_error(window, tolerance):
    (u, trace), (_, finer) = (inverted(Sliding(window, t)) for t in (tolerance, tolerance / 100))
    assert largest(u - EXACT) < 30 * tolerance**0.5
    assert trace.calls <= finer.calls < TOKENS + 1
    assert trace.residuals[0] < tolerance
    assert trace.unfinished == 0


def test_tokens_leave_together_and_later_sweeps_are_as_short():
    laws, told = Laws(0.1), []
    _, trace = inverted(Sliding(8, 1e-6), laws, told=lambda tokens, sweeps: told.append((tokens, sweeps)))
    begins = [start for start, _ in laws.calls]
    assert len(laws.calls) == trace.calls < TOKENS / 2
    assert all(end - start <= 8 for start, end in laws.calls)
    assert [tokens // BATCH for tokens, _ in told] == [b - a for a, b in zip(begins, [*begins[1:], TOKENS])]
    assert {sweeps for _, sweeps in told} == {1}


def test_no_token_leaves_before_it_stands_still_in_every_sample():
    rest, moving = noise(), Laws()
    rest[1:] = 0
    moving.weights *= torch.tensor(0.0)
    u, trace = inverted(Sliding(TOKENS, 1e-9, start="zeros"), moving, rest)
    assert trace.calls == 2
    torch.testing.assert_close(u, rest)


def test_a_window_of_all_tokens_takes_fewer_and_shorter_sweeps_than_a_chunk_of_them():
    laws, chunk = Laws(), Laws()
    u, trace = inverted(Sliding(TOKENS, 1e-10, start="noise"), laws)
    v, whole = inverted(Jacobi(TOKENS, tolerance=1e-10, max_sweeps=100, start="noise"), chunk)
    assert largest(u - EXACT) < 1e-4 > largest(v - EXACT)
    assert trace.calls <= whole.calls + 1
    assert sum(b - a for a, b in laws.calls) < 0.8 * sum(b - a for a, b in chunk.calls)


@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_a_token_takes_at_most_so_many_sweeps(sweeps):
    laws = Laws(0.8)
    u, trace = inverted(Sliding(6, 1e-12, sweeps), laws)
    taken = [sum(a <= i < b for a, b in laws.calls) for i in range(TOKENS)]
    assert max(taken) == sweeps
    assert trace.unfinished == 1
    assert largest((u - inverted(Sequential(), Laws(0.8))[0])[:, :sweeps]) < 1e-12
    assert "did not reach the tolerance" in unfinished([trace])
    assert inverted(Sliding(6, 0.0, sweeps))[1].unfinished == 0


def test_known_tokens_stay_and_are_read_at_once():
    laws, known = Laws(), EXACT[:, :5] + 1
    u, trace = inverted(Sliding(8, 0.0), laws, known=known)
    assert torch.equal(u[:, :5], known)
    torch.testing.assert_close(u, inverted(Sequential(), known=known)[0])
    assert laws.calls[:2] == [(0, 5), (5, 13)]
    assert trace.calls == TOKENS - 5


def test_ranks_leave_the_tokens_that_stand_still_on_all():
    other = []

    def agreed(still):
        other.append(still)
        return still & (torch.arange(len(still)) < 2)

    _, trace = inverted(Sliding(TOKENS, 1e-4), Laws(0.1), agreed=agreed)
    assert trace.calls == len(other) >= TOKENS / 3
    assert inverted(Sliding(TOKENS, 1e-4), Laws(0.1))[1].calls < TOKENS / 3


def test_slow_clips_take_fewer_sweeps_from_the_frame_before():
    torch.manual_seed(0)
    u = noise()[:, :FRAME].repeat(1, TOKENS // FRAME, 1) + 1e-3 * noise(3)
    mu, sigma = Laws(0.3)(torch.cat([FIRST, u[:, :-1]], 1), 0)
    calls = {
        start: inverted(Sliding(8, 1e-4, start=start), Laws(0.3), (u - mu) / sigma)[1] for start in ("noise", "frame")
    }
    assert calls["frame"].calls < calls["noise"].calls


def test_samples_that_are_not_finite_are_told():
    z = noise()
    z[1, 7] = math.inf
    _, trace = inverted(Sliding(8, 1e-6), z=z)
    assert math.isnan(trace.residuals[0])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"window": 0}, "Sliding: window=0, expected at least 1"),
        ({"tolerance": -1.0}, "Sliding: tolerance=-1.0, expected at least 0"),
        ({"max_sweeps": 0}, "Sliding: max_sweeps=0, expected at least 1"),
    ],
)
def test_options_out_of_range(options, line):
    with pytest.raises(ValueError, match=line):
        Sliding(**options)
