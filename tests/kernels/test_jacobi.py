"""The Jacobi update against its formula, the Triton kernel in the interpreter."""

from itertools import product

import pytest
import torch

from penstock.kernels import dispatch, jacobi
from penstock.kernels.jacobi import update


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def given(*shape, **options):
    mu, sigma, z = (normal(*shape, seed=seed, **options) for seed in (1, 2, 3))
    return mu, sigma.exp(), z


def test_formula_and_nothing_beside_the_chunk_changes():
    sequence, (mu, sigma, z) = normal(2, 9, 3), given(2, 4, 3)
    before = sequence.clone()
    residual = update(sequence[:, 3:7], mu, sigma, z, clamp=1.5)
    new = (mu + sigma * z).clamp(-1.5, 1.5)
    assert torch.equal(sequence[:, 3:7], new)
    assert torch.equal(sequence[:, [0, 1, 2, 7, 8]], before[:, [0, 1, 2, 7, 8]])
    expected = ((new - before[:, 3:7]) ** 2).sum() / (new**2).sum()
    torch.testing.assert_close(residual, expected)
    assert update(sequence[:, 3:7], mu, sigma, z, clamp=1.5) == 0


def test_operator_is_registered():
    x = normal(2, 9, 3, dtype=torch.float32)
    arguments = (x[:, 1:5], *given(2, 4, 3, dtype=torch.float32), 0.0)
    torch.library.opcheck(jacobi._update, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shapes_that_the_kernel_refuses():
    x = torch.zeros(2, 3, 4)
    with dispatch.backend("triton"), pytest.raises(ValueError, match=r"\(2, 3, 4\), \(2, 2, 4\), .* of one shape"):
        update(x, x[:, 1:], x, x)


def kernel_against_reference(device: str) -> None:
    """Odd sizes, several programs, strided chunks, half precision, no rows; the same bits twice."""
    shapes, kinds = [(1, 1, 1), (2, 5, 3), (3, 40, 16), (0, 5, 3)], (torch.float32, torch.float64, torch.bfloat16)
    for shape, dtype, clamp in product(shapes, kinds, (0.0, 1.3)):
        batch, n, channels = shape
        found = []
        for backend in ("triton", "triton", "reference"):
            sequence = normal(batch, n + 4, channels, device=device, dtype=dtype)
            laws = given(batch, n + 4, channels, device=device)
            mu, sigma = (x.to(torch.promote_types(dtype, torch.float32))[:, 4:] for x in laws[:2])
            noise = laws[2].to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
            with dispatch.backend(backend):
                residual = update(sequence[:, 2 : n + 2], mu, sigma, noise[:, 1 : n + 1], clamp)
            found.append((sequence, residual))
        for first, second, expected in zip(*found):
            assert first.dtype == expected.dtype
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
            precise = 1e-12 if dtype == torch.float64 else 2e-6
            rtol = 2**-7 if first.dtype == torch.bfloat16 else precise
            torch.testing.assert_close(first, expected, rtol=rtol, atol=precise, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_cuda():
    kernel_against_reference("cuda")
