"""One autoregressive block: its Jacobian, its laws in chunks, its fixed-point inverses; closed forms of Gaussians."""

import math

import pytest
import torch

from penstock.kernels.affine import AT_ZERO, moments
from penstock.lightning_modules.flow.affine import ScoreGuidance, nll
from penstock.lightning_modules.flow.inverse import Jacobi, Sequential
from penstock.lightning_modules.nets.autoregressive import AutoregressiveBlock, Decoder
from penstock.lightning_modules.nets.rotary import Rotary
from penstock.lightning_modules.nets.starflow import plain

GRID, TOKENS, CHANNELS = (1, 4, 6), 24, 3


def random_block(text_dim=0, layers=2, rotary=None, **options):
    torch.manual_seed(0)
    block = AutoregressiveBlock(
        CHANNELS, 64, layers, rotary or Rotary(32, side=4), text_dim, layer=plain(32), **options
    )
    torch.nn.init.normal_(block.proj_out.weight, std=0.05)
    return block


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def inverted(block, z, inverse, grid=GRID, **options):
    first, rest = block.split(z)
    u, trace = inverse(Decoder(block, grid, len(z), **options), first, rest, grid[1] * grid[2])
    return (u if block.sos_embed is not None else torch.cat([first, u], 1)), trace


def largest(x):
    return float(x.detach().abs().max())


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": "exp", "soft_clip": 0.0}, {"start_token": False}, {"scale": "one"}, {"rotary": Rotary(32, 1)}],
)
def test_the_inverse_undoes_the_block(options):
    block, u = random_block(**options), normal(2, TOKENS, CHANNELS)
    z = block(u, GRID).z.detach()
    assert largest(z - u) > 0.1
    assert largest(inverted(block, z, Sequential())[0] - u) < 1e-5


@pytest.mark.parametrize("options", [{}, {"scale": "exp"}, {"start_token": False}, {"scale": "one"}])
def test_log_determinant(options):
    block, u = random_block(**options).double(), normal(1, 6, CHANNELS).double()
    jacobian = torch.autograd.functional.jacobian(lambda u: block(u, (1, 2, 3)).z, u).reshape(18, 18)
    torch.testing.assert_close(
        block(u, (1, 2, 3)).logdet.sum(), torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-12
    )
    assert not jacobian.triu(1)[torch.ones(18, 18).triu(1) > 0].any()


def test_a_token_does_not_depend_on_itself_or_on_later_ones():
    block, u = random_block(5), normal(1, TOKENS, CHANNELS).requires_grad_()
    raw = block(u, GRID, normal(1, 4, 5)).raw
    (gradient,) = torch.autograd.grad(raw[:, 10].sum(), u)
    reached = gradient.abs().sum((0, 2)) > 0
    assert reached.tolist() == [True] * 10 + [False] * 14


@pytest.mark.parametrize("text_dim", [0, 5])
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 12, 7]])
def test_laws_in_chunks_are_those_of_one_pass(text_dim, chunks):
    block, u = random_block(text_dim), normal(2, TOKENS, CHANNELS)
    text = normal(2, 4, 5) if text_dim else None
    with torch.no_grad():
        laws, before, found, place = Decoder(block, GRID, 2, text), torch.cat([block.split(u)[0], u[:, :-1]], 1), [], 0
        for chunk in before.split(chunks, 1):
            found.append(laws(chunk, place))
            place += chunk.shape[1]
    mu, sigma = (torch.cat(parts, 1) for parts in zip(*found))
    expected = block(u, GRID, text)
    torch.testing.assert_close((u - mu) / sigma, expected.z, rtol=0, atol=1e-5)
    torch.testing.assert_close(-sigma.log(), expected.logdet, rtol=0, atol=1e-5)
    assert laws.tokens == TOKENS


def test_laws_beyond_the_sequence():
    block = random_block()
    with torch.no_grad(), pytest.raises(ValueError, match="Cache: 25 tokens, expected at most 24"):
        Decoder(block, GRID, 2)(normal(2, 2, CHANNELS), TOKENS - 1)


# ---------------------------------------------------------------------- fixed points


def test_sweeps_over_the_whole_block():
    block, z = random_block(), normal(2, TOKENS, CHANNELS)
    exact, _ = inverted(block, z, Sequential())
    errors = []
    for sweeps in (1, 2, 3, 5, 8, 12):
        u, _ = inverted(block, z, Jacobi(TOKENS, tolerance=0, max_sweeps=sweeps, start="noise"))
        assert largest((u - exact)[:, :sweeps]) < 1e-5
        errors.append(largest(u - exact))
    assert errors[0] > 0.05
    assert errors[3] < 1e-2
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("chunk", [1, 4, 7, 24])
@pytest.mark.parametrize("start", ["noise", "frame"])
def test_chunks_of_any_size_are_the_sequential_inverse(chunk, start):
    block, z, grid = random_block(5), normal(2, TOKENS, CHANNELS), (4, 2, 3)
    options = {"grid": grid, "cond": normal(2, 4, 5), "weak": normal(2, 4, 5, seed=2), "guidance": ScoreGuidance(1.5)}
    exact, _ = inverted(block, z, Sequential(), **options)
    found, trace = inverted(block, z, Jacobi(chunk, 2 * chunk, 0, 100, start), **options)
    assert largest(found - exact) < 1e-5
    assert trace.calls == TOKENS


def test_tolerances():
    block, z = random_block(), normal(2, TOKENS, CHANNELS)
    exact, _ = inverted(block, z, Sequential())
    rms = [float((inverted(block, z, Jacobi(8, tolerance=t))[0] - exact).square().mean().sqrt()) for t in (1e-3, 1e-8)]
    assert 1e-4 < rms[0] < 0.05
    assert rms[1] < 1e-4


def test_a_slow_clip_takes_no_more_sweeps_from_the_frame_before_than_from_noise():
    grid = (6, 2, 3)
    block = random_block()
    u = normal(2, 6, CHANNELS).repeat(1, 6, 1) + 0.02 * normal(2, 36, CHANNELS, seed=2)
    with torch.no_grad():
        z = block(u, grid).z
    noise, frame = (
        inverted(block, z, Jacobi(6, tolerance=1e-4, start=start), grid)[1].sweeps for start in ("noise", "frame")
    )
    assert all(a <= b for a, b in zip(frame[2:], noise[2:]))
    assert sum(frame[2:]) < sum(noise[2:])


# ---------------------------------------------------------------------- guidance


def halves(block):
    """What the first layer gets in every call of a decoder from here on."""
    seen = []
    block.proj_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


@pytest.mark.parametrize("inverse", [Sequential(), Jacobi(8)])
def test_both_halves_get_the_same_tokens(inverse):
    block = random_block(5)
    seen = halves(block)
    options = {"cond": normal(2, 4, 5), "weak": normal(2, 4, 5, seed=2), "guidance": ScoreGuidance(2.0)}
    inverted(block, normal(2, TOKENS, CHANNELS), inverse, **options)
    assert len(seen) > 3
    for x in seen:
        conditional, other = x.chunk(2)
        assert torch.equal(conditional, other)


def test_no_guidance_and_equal_conditions():
    block, z, text = random_block(5), normal(2, TOKENS, CHANNELS), normal(2, 4, 5)
    plainly, _ = inverted(block, z, Sequential(), cond=text)
    none, _ = inverted(block, z, Sequential(), cond=text, weak=-text, guidance=ScoreGuidance(0.0))
    same, _ = inverted(block, z, Sequential(), cond=text, weak=text, guidance=ScoreGuidance(3.0))
    guided, _ = inverted(block, z, Sequential(), cond=text, weak=-text, guidance=ScoreGuidance(3.0))
    assert largest(none - plainly) < 1e-5
    assert largest(same - plainly) < 1e-5
    assert largest(guided - plainly) > 1e-2


def test_a_cache_of_half_precision_takes_half_the_memory():
    block, z = random_block(), normal(2, TOKENS, CHANNELS)
    exact, _ = inverted(block, z, Sequential())
    found, _ = inverted(block, z, Sequential(), dtype=torch.bfloat16)
    assert 0 < largest(found - exact) < 0.05
    stores = [Decoder(block, GRID, 2, dtype=dtype).cache.keys for dtype in (torch.bfloat16, None)]
    assert 2 * stores[0].nbytes == stores[1].nbytes


def test_conditions_that_are_missing():
    block, u = random_block(5), normal(2, TOKENS, CHANNELS)
    with pytest.raises(ValueError, match=r"expected text \(B, L, 5\), got none"):
        block(u, GRID)
    with pytest.raises(ValueError, match="expected a condition of the unconditional half, got none"):
        Decoder(block, GRID, 2, normal(2, 4, 5), guidance=ScoreGuidance(1.0))


def test_text_of_another_width_without_a_projection():
    with pytest.raises(ValueError, match="text of 5 numbers without a projection, expected 64"):
        random_block(5, project_text=False)


# ---------------------------------------------------------------------- laws


def test_moments():
    raw = torch.tensor([0.0, 1e3, -1e3, 0.0, 1e3, 2.0])
    mu, sigma = moments(raw)
    assert sigma.tolist() == pytest.approx([1.0, 4.552, 0.0310], abs=5e-4)
    assert mu.tolist() == pytest.approx([0.0, 4.0, 4 * math.tanh(0.5)])
    mu, sigma = moments(raw / 1e3, "exp", soft_clip=0.0)
    assert sigma.tolist() == pytest.approx([1.0, math.e, 1 / math.e])
    assert mu.tolist() == pytest.approx([0.0, 1.0, 2e-3])
    mu, sigma = moments(raw, "one", soft_clip=0.0)
    assert torch.equal(mu, raw)
    assert torch.equal(sigma, torch.ones(6))
    assert moments(raw.bfloat16())[1].dtype == torch.float32


def exact_block(scale):
    """The flow of N(0, scale^2), which needs no training."""
    block = AutoregressiveBlock(CHANNELS, 64, 1, Rotary(32), layer=plain(32)).double()
    a = math.log(math.expm1(scale)) - AT_ZERO
    with torch.no_grad():
        block.proj_out.bias[:CHANNELS], block.proj_out.bias[CHANNELS:] = 4 * math.atanh(a / 4), 0
    return block


@pytest.mark.parametrize(("scale", "sigma"), [(1.0, 0.3), (0.5, 0.5)])
def test_gaussian_data_reach_their_entropy_and_tweedie_their_posterior(scale, sigma):
    block = exact_block(math.hypot(scale, sigma))
    clean = scale * normal(1000, TOKENS, CHANNELS).double()
    x = (clean + sigma * normal(1000, TOKENS, CHANNELS, seed=2)).requires_grad_()
    found = block(x, GRID)
    loss = nll(found.z, [found.logdet]).mean()
    entropy = 0.5 * math.log(2 * math.pi * math.e * (scale**2 + sigma**2))
    assert float(loss.detach()) + 0.9189385 == pytest.approx(entropy, abs=0.01)
    (gradient,) = torch.autograd.grad(loss, x)
    denoised = x - sigma**2 * x.numel() * gradient
    posterior = scale**2 * sigma**2 / (scale**2 + sigma**2)
    assert float((denoised - clean).detach().square().mean()) == pytest.approx(posterior, rel=0.02)
    assert float((x - clean).detach().square().mean()) == pytest.approx(sigma**2, rel=0.02)


def test_a_new_block_depends_on_its_biases_only():
    torch.manual_seed(0)
    block, u = AutoregressiveBlock(CHANNELS, 64, 2, Rotary(32), layer=plain(32)), normal(2, TOKENS, CHANNELS)
    found = block(u, GRID)
    assert torch.equal(found.raw, block.proj_out.bias.expand(2, TOKENS, -1))
    assert 0 < largest(found.z - u) < 0.5
