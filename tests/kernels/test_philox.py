"""Philox4x32-10: Random123's known answers, statistics, invariances, the Triton kernel in its interpreter."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from penstock.kernels import dispatch, philox
from penstock.kernels.philox import Draws

ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
@pytest.mark.parametrize("array", [lambda x: torch.tensor([x]), lambda x: np.array([x], dtype=np.uint64)])
def test_known_answers_of_random123(counter, key, answer, array):
    assert tuple(int(w[0]) for w in philox.philox4x32(*map(array, counter), *key)) == answer


def test_counter_layout_matches_python_integers():
    seed, epoch, index, name, element = 2**63 + 12345, 77, 5 * 2**32 + 9, "noise", 6
    counter = [element // 4, index % 2**32, epoch ^ ((index >> 32) << 16), philox.stream(name)]
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(p1 >> 32) ^ counter[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ counter[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    draws = Draws(seed, epoch, torch.tensor([3, index]))
    assert draws.uniform(name, (8,), torch.float64)[1, 6].item() == (counter[2] + 0.5) / 2**32
    assert draws.uniform(name, (8,))[1, 6].item() == ((counter[2] >> 9) + 0.5) / 2**23
    radius = np.sqrt(-2 * np.log((counter[2] + 0.5) / 2**32))
    angle = 2 * np.pi * (counter[3] + 0.5) / 2**32
    expected = torch.tensor([radius * np.cos(angle), radius * np.sin(angle)], dtype=torch.float64)
    torch.testing.assert_close(draws.normal(name, (8,), torch.float64)[1, 6:], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_words_stay_inside_the_open_interval_and_finite(dtype):
    u = philox._open_unit(torch.tensor([0, ONES]), dtype)
    assert 0 < u[0] < u[1] < 1
    z = philox._box_muller(torch.tensor([[0, 0, ONES, ONES, 0, ONES, ONES, 0]]), dtype)
    assert z.isfinite().all()
    assert z.abs().max() < 6.77


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions(dtype):
    draws = Draws(1, 0, torch.arange(2000))
    u, z = draws.uniform("u", (51,), dtype).flatten().numpy(), draws.normal("z", (51,), dtype).flatten().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(stats.skew(z)) < 0.03
    assert abs(stats.kurtosis(z)) < 0.06


def test_neighbouring_keys_are_independent():
    base = {"seed": 5, "epoch": 3, "name": "noise", "first": 0}
    rows = []
    for change in ({}, {"seed": 6}, {"seed": 5 + 2**32}, {"epoch": 4}, {"name": "noisf"}, {"first": 1000}):
        k = base | change
        rows.append(Draws(k["seed"], k["epoch"], torch.arange(1000) + k["first"]).normal(k["name"], (20,)).flatten())
    rows = torch.stack(rows)
    correlation = rows.corrcoef() - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 20000**0.5
    z = Draws(5, 3, torch.arange(20000)).normal("noise", (8,))
    assert (z.T.corrcoef() - torch.eye(8)).abs().max() < 5 / 20000**0.5
    assert abs(float((z[1:] * z[:-1]).mean())) < 5 / 160000**0.5


def test_no_two_counters_meet():
    index = torch.tensor([0, 1, 2**32, 2**32 + 1, 2**33, 2**47])
    u = torch.cat([Draws(0, e, index).uniform("u", (), torch.float64) for e in (0, 1, 2, 3, 65535)])
    assert u.unique().numel() == u.numel()


def test_rows_do_not_depend_on_order_split_or_strides():
    index = torch.tensor([7, 3, 2**40 + 1, 0, 11])
    whole = Draws(9, 1, index).normal("n", (3, 5))
    assert torch.equal(Draws(9, 1, index.flip(0)).normal("n", (3, 5)), whole.flip(0))
    assert torch.equal(torch.cat([Draws(9, 1, part).normal("n", (3, 5)) for part in index.split([1, 3, 1])]), whole)
    strided = torch.stack((index, index + 1), 1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(Draws(9, 1, strided).normal("n", (3, 5)), whole)


def test_large_batches_are_made_in_parts(monkeypatch):
    draws = Draws(9, 1, torch.arange(100))
    monkeypatch.setattr(philox, "CACHED", 10**9)
    whole = draws.normal("n", (37,))
    for blocks in (1, 30, 999):
        monkeypatch.setattr(philox, "CACHED", blocks)
        assert torch.equal(draws.normal("n", (37,)), whole)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_longer_draw_begins_with_the_shorter(kind):
    draws = Draws(9, 1, torch.arange(4))
    long = getattr(draws, kind)("n", (13,))
    for n in (1, 2, 3, 4, 5, 12):
        assert torch.equal(getattr(draws, kind)("n", (n,)), long[:, :n])
    assert torch.equal(getattr(draws, kind)("n"), long[:, 0])


def test_uniform_of_both_precisions_is_the_same_draw():
    draws = Draws(9, 1, torch.arange(1000))
    difference = draws.uniform("n", (9,)).double() - draws.uniform("n", (9,), torch.float64)
    assert 0 < difference.abs().max() < 2**-23
    torch.testing.assert_close(
        draws.normal("n", (9,)).double(), draws.normal("n", (9,), torch.float64), atol=2e-6, rtol=1e-3
    )


@pytest.mark.parametrize(("size", "shape"), [(5, (3, 7)), (0, (2,)), (3000, (2, 16))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_draws_at_once_are_the_two_draws(size, shape, dtype):
    draws = Draws(7, 2, torch.arange(size) * 11)
    z, u = draws.both(("noise", shape), ("time", (2,)), dtype)
    assert (z.shape, u.shape, z.dtype, u.dtype) == ((size, *shape), (size, 2), dtype, torch.float32)
    assert torch.equal(z, draws.normal("noise", shape, dtype))
    assert torch.equal(u, draws.uniform("time", (2,)))


def test_empty_batch_and_empty_shape():
    assert Draws(0, 0, torch.arange(0)).normal("n", (3,)).shape == (0, 3)
    assert Draws(0, 0, torch.arange(2)).uniform("n", (0, 3)).shape == (2, 0, 3)
    assert Draws(0, 0, torch.arange(0)).uniform("n").shape == (0,)


def test_generator_is_keyed_by_everything():
    def first(seed=1, epoch=0, index=(1, 2), name="a"):
        return torch.rand((), generator=Draws(seed, epoch, torch.tensor(index)).generator(name)).item()

    others = [first(seed=2), first(epoch=1), first(index=(2, 1)), first(index=(1,)), first(name="b")]
    assert first() == first()
    assert len({first(), *others}) == 6


def test_generic_device_path_equals_the_numpy_path():
    index, block = torch.tensor([4, 2**35 + 1])[:, None], torch.arange(3)[None]
    words = philox.philox4x32(
        block, index & ONES, 6 ^ (index >> 32 << 16), torch.full((1, 1), philox.stream("s")), 8, 0
    )
    u = (torch.stack(torch.broadcast_tensors(*words), -1).flatten(1).double() + 0.5) / 2**32
    assert torch.equal(Draws(8, 6, index[:, 0]).uniform("s", (12,), torch.float64), u)


def test_meta_compile_and_opcheck():
    assert Draws(1, 2, torch.arange(5, device="meta")).normal("n", (3,), torch.float64).shape == (5, 3)
    torch.library.opcheck(philox.philox, (torch.arange(3), 1, 2, 3, 5, True, torch.float32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, index, epoch):
        draws = Draws(7, epoch, index)
        return x + draws.normal("n", (3,)) * draws.uniform("t")[:, None]

    index, x = torch.arange(4), torch.zeros(4, 3)
    for epoch in range(3):
        draws = Draws(7, epoch, index)
        assert torch.equal(step(x, index, epoch), draws.normal("n", (3,)) * draws.uniform("t")[:, None])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: Draws(-1, 0, i), r"seed -1, expected an integer in \[0, 2\^64\)"),
        (lambda i: Draws(2**64, 0, i), "seed 18446744073709551616"),
        (lambda i: Draws(0, 2**32, i), r"epoch 4294967296, expected an integer in \[0, 2\^32\)"),
        (lambda i: Draws(0, 0, i.int()), r"index torch.int32 of shape \(2,\), expected int64 of shape \(B,\)"),
        (lambda i: Draws(0, 0, i[None]), r"shape \(1, 2\)"),
        (lambda i: Draws(0, 0, i).uniform("u", (), torch.bfloat16), "dtype torch.bfloat16, expected torch.float32"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.arange(2))


def test_backend_override(monkeypatch):
    x = torch.zeros(1)
    assert not dispatch.use_triton(x)
    monkeypatch.setenv("PENSTOCK_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    assert dispatch.use_triton(x)
    with dispatch.backend("reference"):
        assert not dispatch.use_triton(x)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        dispatch.use_triton(x)
    monkeypatch.setenv("PENSTOCK_KERNELS", "cuda")
    with pytest.raises(ValueError, match="backend 'cuda', expected one of auto, reference, triton"):
        dispatch.use_triton(x)
    with pytest.raises(ValueError, match="backend 'numpy'"), dispatch.backend("numpy"):
        pass


def kernel_against_reference(device: str) -> None:
    """Uniforms bit-equal, normals to 1e-6 (float32) and 1e-14 (float64), odd sizes, several programs, strided index."""
    index = torch.tensor([0, -1, 2**33 + 7, 0, 2**40, 0, 77, 3], device=device)[::2]
    many = torch.arange(130, device=device) * 1_000_003
    shapes = [(index, s) for s in ((), (1,), (3,), (5, 7), (64,))] + [(many, (11,)), (many[:0], (4,))]
    for (rows, shape), dtype in product(shapes, (torch.float32, torch.float64)):
        draws = Draws(2**64 - 5, 3, rows)
        with dispatch.backend("triton"):
            u, z = draws.uniform("a", shape, dtype), draws.normal("b", shape, dtype)
        with dispatch.backend("reference"):
            u_ref, z_ref = draws.uniform("a", shape, dtype), draws.normal("b", shape, dtype)
        assert u.dtype == dtype
        assert torch.equal(u, u_ref)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(z, z_ref, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_cuda():
    kernel_against_reference("cuda")
    index = torch.arange(9)
    assert torch.equal(Draws(1, 2, index.cuda()).uniform("u", (7,)).cpu(), Draws(1, 2, index).uniform("u", (7,)))


def test_works_where_triton_is_not_installed():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from penstock.kernels.philox import Draws;"
        "print(tuple(Draws(0, 0, torch.arange(2)).normal('n', (3,)).shape))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "(2, 3)\n", run.stderr[-2000:]
