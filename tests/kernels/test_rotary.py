"""Rotation against products of complex numbers, its gradient, the Triton kernel where its interpreter runs."""

from itertools import product

import pytest
import torch

from penstock.kernels import dispatch, rotary
from penstock.kernels.rotary import rotate


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def table(places, size, **options):
    angles = 3 * normal(places, size // 2, seed=1)
    return angles.cos().to(**options), angles.sin().to(**options)


@pytest.mark.parametrize("halves", [False, True])
def test_pairs_are_complex_numbers(halves):
    x, (cos, sin) = normal(2, 3, 5, 8), table(5, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:]) if halves else torch.complex(x[..., 0::2], x[..., 1::2])
    turned = pairs * torch.complex(cos, sin)
    expected = [turned.real, turned.imag]
    expected = torch.cat(expected, -1) if halves else torch.stack(expected, -1).flatten(-2)
    torch.testing.assert_close(rotate(x, cos, sin, halves), expected)
    torch.testing.assert_close(rotary.reference(expected, cos, sin, halves, back=True), x)


def test_half_precision_is_rotated_in_full_precision():
    x, (cos, sin) = normal(2, 3, 5, 8, dtype=torch.bfloat16), table(5, 8, dtype=torch.float32)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())


@pytest.mark.parametrize("halves", [False, True])
def test_gradient_of_the_operator(halves):
    x, (cos, sin) = normal(2, 1, 3, 6).requires_grad_(), table(3, 6)
    assert torch.autograd.gradcheck(lambda x: rotary._rotate(x, cos, sin, halves, False), x)


def test_operator_is_registered_and_compiles():
    x, (cos, sin) = normal(2, 3, 5, 8, dtype=torch.float32).transpose(1, 2).requires_grad_(), table(3, 8)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(rotary._rotate, (x, cos, sin, True, False), test_utils=checks)
    assert torch.compile(rotate, fullgraph=True, backend="eager")(x, cos, sin).equal(rotate(x, cos, sin))


def test_shapes_that_the_kernel_refuses():
    with dispatch.backend("triton"), pytest.raises(ValueError, match=r"\(2, 5, 8\) by \(5, 4\), expected \(B, heads"):
        rotate(normal(2, 5, 8, dtype=torch.float32), *table(5, 8))
    with dispatch.backend("triton"), pytest.raises(ValueError, match=r"\(1, 2, 5, 8\) by \(6, 4\)"):
        rotate(normal(1, 2, 5, 8, dtype=torch.float32), *table(6, 8))


def kernel_against_reference(device: str) -> None:
    """Equal to the reference in float32, gradients too; odd sizes, strides of a fused projection, no rows."""
    shapes = [(2, 5, 3, 24), (1, 1, 1, 2), (0, 3, 2, 8), (3, 9, 2, 64)]
    for shape, halves, dtype in product(shapes, (False, True), (torch.float32, torch.bfloat16)):
        cos, sin = table(shape[1], shape[3], device=device, dtype=torch.float32)
        x = normal(*shape, device=device, dtype=dtype).transpose(1, 2)
        weight = normal(*x.shape, seed=2, device=device, dtype=dtype)
        found = []
        for backend, kind in (("triton", dtype), ("reference", torch.float32)):
            own = x.to(kind, copy=True).requires_grad_()
            with dispatch.backend(backend):
                y = rotate(own, cos, sin, halves)
                (y * weight).sum().backward()
            found.append((y.detach(), own.grad))
        for ours, theirs in zip(*found):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.float(), theirs, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_cuda():
    kernel_against_reference("cuda")
