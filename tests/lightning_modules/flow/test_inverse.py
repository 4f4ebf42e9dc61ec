"""Inverses of an autoregressive map whose laws are small formulas, with a memory in the place of a cache."""

import pytest
import torch
from token_laws import TokenLaws

from penstock.lightning_modules.flow.inverse import Jacobi, Sequential, guess, prepared

BATCH, FRAME, TOKENS = 2, 4, 12


class Laws(TokenLaws):
    """Of this file's size."""

    def __init__(self, tokens=TOKENS, strength=0.7):
        super().__init__(BATCH, tokens, strength)


class Told:
    """What an inverse tells of its progress."""

    def __init__(self):
        self.tokens, self.sweeps = [], []

    def __call__(self, tokens, sweeps):
        self.tokens.append(tokens // BATCH)
        self.sweeps.append(sweeps)


FIRST = torch.full((BATCH, 1, 1), 0.5).double()


def noise(seed=1, tokens=TOKENS):
    return torch.randn(BATCH, tokens, 1, generator=torch.Generator().manual_seed(seed)).double()


def forward(laws, u):
    mu, sigma = laws(torch.cat([FIRST, u[:, :-1]], 1), 0)
    return (u - mu) / sigma


def inverted(inverse, z=None, **options):
    u, trace = inverse(Laws(), FIRST, noise() if z is None else z, FRAME, **options)
    return u, trace


EXACT, _ = inverted(Sequential())


def largest(x):
    return float(x.abs().max())


def test_token_by_token():
    told, laws = Told(), Laws()
    u, trace = Sequential()(laws, FIRST, noise(), FRAME, told=told)
    assert largest(forward(Laws(), u) - noise()) < 1e-12
    assert trace.calls == len(laws.calls) == sum(told.tokens) == sum(told.sweeps) == TOKENS
    assert trace.residuals == [0.0] * TOKENS
    assert trace.unfinished == 0


@pytest.mark.parametrize("start", ["noise", "zeros", "frame"])
@pytest.mark.parametrize("sweeps", range(1, TOKENS + 1))
def test_the_first_k_tokens_are_exact_after_k_sweeps(start, sweeps):
    u, trace = inverted(Jacobi(TOKENS, tolerance=0, max_sweeps=sweeps, start=start))
    assert largest((u - EXACT)[:, :sweeps]) < 1e-12
    assert trace.sweeps == [sweeps]


@pytest.mark.parametrize("start", ["noise", "zeros", "frame"])
@pytest.mark.parametrize("later", [None, 3, 8])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 12, 100])
@pytest.mark.parametrize("refresh", [True, False])
def test_chunks_of_any_size_without_tolerance_are_exact(chunk, later, start, refresh):
    u, trace = inverted(Jacobi(chunk, later, 0, 100, start, refresh=refresh))
    assert largest(u - EXACT) < 1e-12
    assert trace.calls == TOKENS


def test_chunks_grow_after_the_first_frame():
    told = Told()
    _, trace = inverted(Jacobi(3, 5, tolerance=0), told=told)
    assert told.tokens == told.sweeps == trace.sweeps == [3, 3, 5, 1]


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
def test_a_chunk_takes_at_most_as_many_sweeps_as_it_has_tokens(tolerance):
    told = Told()
    u, trace = inverted(Jacobi(5, 4, tolerance), told=told)
    assert all(1 <= sweeps <= size for sweeps, size in zip(trace.sweeps, told.tokens, strict=True))
    assert largest(u - EXACT) < 20 * tolerance**0.5
    assert trace.unfinished == 0


def test_a_smaller_tolerance_takes_more_sweeps_and_leaves_a_smaller_error():
    tolerances = (1e-1, 1e-3, 1e-6)
    found = [inverted(Jacobi(TOKENS, tolerance=tolerance)) for tolerance in tolerances]
    assert all(trace.residuals[0] < tolerance for (_, trace), tolerance in zip(found, tolerances))
    errors, calls = [largest(u - EXACT) for u, _ in found], [trace.calls for _, trace in found]
    assert errors == sorted(errors, reverse=True)
    assert calls == sorted(calls)
    assert calls[0] < calls[-1]


def test_chunks_that_were_cut_short_are_counted():
    _, trace = inverted(Jacobi(6, tolerance=1e-9, max_sweeps=2))
    assert trace.sweeps == [2, 2]
    assert trace.unfinished == 2
    assert min(trace.residuals) > 1e-9


@pytest.mark.parametrize("refresh", [True, False])
def test_later_chunks_look_back_on_what_came_out_or_on_what_went_into_the_last_sweep(refresh):
    laws = Laws()
    u, _ = Jacobi(4, tolerance=0, max_sweeps=2, start="noise", refresh=refresh)(laws, FIRST, noise(), FRAME)
    assert torch.equal(laws.memory[:, 1:8], u[:, :7]) == refresh


def test_a_chunk_starts_from_the_frame_before_and_goes_on_repeating_it():
    x = torch.arange(13.0)[None, :, None]
    guess(x, 5, 12, FRAME, "frame")
    assert x.flatten().tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4]


def test_the_first_frame_starts_from_noise():
    x = torch.arange(13.0)[None, :, None]
    guess(x, 3, 12, FRAME, "frame")
    assert x.flatten().tolist() == list(range(13))


def test_slow_clips_take_fewer_sweeps_from_the_frame_before():
    frames = 8
    u = noise(2, FRAME).repeat(1, frames, 1) + 1e-3 * noise(3, frames * FRAME)
    z = forward(Laws(tokens=frames * FRAME, strength=0.3), u)
    sweeps = {}
    for start in ("noise", "frame"):
        laws = Laws(tokens=frames * FRAME, strength=0.3)
        found, trace = Jacobi(FRAME, tolerance=1e-4, start=start)(laws, FIRST, z, FRAME)
        assert largest(found - u) < 0.1
        sweeps[start] = trace.sweeps[2:]
    assert all(a <= b for a, b in zip(sweeps["frame"], sweeps["noise"], strict=True))
    assert sum(sweeps["frame"]) < sum(sweeps["noise"]) / 1.5


@pytest.mark.parametrize("inverse", [Sequential(), Jacobi(3, 5, tolerance=0), Jacobi(3, 5, 0, refresh=False)])
@pytest.mark.parametrize("number", [0, 1, 4, 5, 12])
def test_known_tokens_stay_and_the_others_follow_from_them(inverse, number):
    known, told = torch.linspace(-1, 1, BATCH * number).reshape(BATCH, number, 1).double(), Told()
    u, trace = inverted(inverse, known=known, told=told)
    assert torch.equal(u[:, :number], known)
    torch.testing.assert_close(forward(Laws(), u)[:, number:], noise()[:, number:])
    assert trace.calls == sum(told.tokens) == sum(told.sweeps) == TOKENS - number


def test_known_tokens_are_read_at_once():
    laws = Laws()
    sequence, number = prepared(laws, FIRST, noise(), noise(5, 4))
    assert number == 4
    assert laws.calls == [(0, 4)]
    assert torch.equal(laws.memory[:, :4], sequence[:, :4])


@pytest.mark.parametrize("shape", [(BATCH, TOKENS + 1, 1), (BATCH + 1, 2, 1), (BATCH, 2, 3)])
def test_known_tokens_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"known tokens \(\d+, \d+, \d\), expected at most those of \(2, 12, 1\)"):
        inverted(Sequential(), known=torch.zeros(shape))


def test_iterates_are_clamped():
    u, trace = inverted(Jacobi(TOKENS // 3, tolerance=0, max_sweeps=2, start="zeros", clamp=1.0), 10 * noise())
    assert largest(u) == 1.0
    assert trace.sweeps == [2] * 3


def test_noise_stays_as_it_is():
    z = noise()
    for inverse in (Sequential(), Jacobi(3), Jacobi(3, start="zeros")):
        inverted(inverse, z, known=FIRST)
        assert torch.equal(z, noise())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"chunk": 0}, "chunk=0, expected at least 1"),
        ({"later": 0}, "later=0, expected at least 1"),
        ({"tolerance": -1e-3}, "tolerance=-0.001, expected at least 0"),
        ({"max_sweeps": 0}, "max_sweeps=0, expected at least 1"),
        ({"clamp": -1.0}, "clamp=-1.0, expected at least 0"),
    ],
)
def test_options_out_of_range(options, line):
    with pytest.raises(ValueError, match=line):
        Jacobi(**options)


def test_ranks_that_have_to_agree_sweep_until_the_last_is_done():
    asked = []

    def agreed(done):
        asked.append(bool(done))
        return done & (len(asked) >= 7)

    _, alone = inverted(Jacobi(TOKENS, tolerance=1e-2))
    _, together = inverted(Jacobi(TOKENS, tolerance=1e-2), agreed=agreed)
    assert alone.calls < 7
    assert together.calls == len(asked) == 7
    assert asked[alone.calls - 1] is True
