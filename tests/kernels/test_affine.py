"""The affine map of a flow against NumPy in double precision, its gradient, the Triton kernel in the interpreter."""

from itertools import product

import numpy as np
import pytest
import torch

from penstock.kernels import affine, dispatch
from penstock.kernels.affine import encode

SCALES = ("softplus", "exp", "one")


def normal(*shape, seed=0, scale=1.0, **options):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * x).to(**options)


def given(scale, *rows, channels=3, **options):
    raw = normal(*rows, channels * (1 if scale == "one" else 2), scale=3, **options)
    return raw, normal(*rows, channels, seed=1, **options)


@pytest.mark.parametrize("clip", [0.0, 4.0, 1.5])
@pytest.mark.parametrize("scale", SCALES)
def test_formula(scale, clip):
    raw, u = given(scale, 2, 5, dtype=torch.float64)
    bent = clip * np.tanh(raw.numpy() / clip) if clip else raw.numpy()
    a, mu = (np.zeros_like(bent), bent) if scale == "one" else (bent[..., :3], bent[..., 3:])
    log_sigma = {"softplus": np.log(np.logaddexp(0, a + np.log(np.e - 1))), "exp": a, "one": a}[scale]
    z, logdet = encode(raw, u, scale, clip)
    torch.testing.assert_close(z, torch.from_numpy((u.numpy() - mu) * np.exp(-log_sigma)))
    torch.testing.assert_close(logdet, torch.from_numpy(-log_sigma))


def test_log_determinants_of_half_precision_are_single():
    raw, u = given("softplus", 4, 1000, dtype=torch.bfloat16)
    z, logdet = encode(raw, u)
    assert (z.dtype, logdet.dtype) == (torch.bfloat16, torch.float32)
    _, exact = encode(raw.double(), u.double())
    torch.testing.assert_close(logdet.double(), exact, rtol=1e-5, atol=1e-6)
    assert (logdet.bfloat16().double() - exact).abs().max() > 1e-3


@pytest.mark.parametrize("clip", [0.0, 2.0])
@pytest.mark.parametrize("scale", SCALES)
def test_gradient_of_the_operator(scale, clip):
    raw, u = (x.requires_grad_() for x in given(scale, 2, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda raw, u: affine._encode(raw, u, scale, clip), (raw, u))


def test_operator_is_registered_and_compiles():
    raw, u = (x.requires_grad_() for x in given("softplus", 2, 5, dtype=torch.float32))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(affine._encode, (raw, u, "softplus", 4.0), test_utils=checks)
    compiled = torch.compile(encode, fullgraph=True, backend="eager")
    assert all(a.equal(b) for a, b in zip(compiled(raw, u), encode(raw, u)))
    assert [x.dtype for x in affine._encode(raw.bfloat16().to("meta"), u.to("meta"), "exp", 0.0)] == [torch.float32] * 2


def test_an_output_that_does_not_fit():
    with pytest.raises(ValueError, match=r"output \(2, 3\) of scale 'softplus' for tokens \(2, 3\)"):
        encode(torch.zeros(2, 3), torch.zeros(2, 3))


def results(backend, raw, u, weights, scale, clip):
    """`z`, `-log sigma` and the gradients of a weighted sum of both."""
    raw, u = (x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (raw, u))
    with dispatch.backend(backend):
        found = encode(raw, u, scale, clip)
        sum((x * w).sum() for x, w in zip(found, weights)).backward()
    return *(x.detach() for x in found), raw.grad, u.grad


def kernel_against_reference(device: str) -> None:
    """To the precision of the dtype; several programs, strides, no rows, outputs far out, one gradient alone."""
    kinds = [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 2**-7)]
    for scale, clip, (dtype, tolerance) in product(SCALES, (0.0, 4.0), kinds):
        for rows in ((2, 130), (0, 4)):
            raw, u = given(scale, *rows, device=device, dtype=dtype)
            weights = normal(*u.shape, seed=2, device=device), normal(*u.shape, seed=3, device=device)
            raw, u, *weights = (x.transpose(0, 1) for x in (raw, u, *weights))
            ours, theirs = (results(b, raw, u, weights, scale, clip) for b in ("triton", "reference"))
            for a, b in zip(ours, theirs):
                assert a.dtype == b.dtype
                size = float(b.abs().max()) if b.numel() else 0
                torch.testing.assert_close(a, b, atol=tolerance * (1 + size), rtol=4 * tolerance)
    far = torch.tensor([[1e3, -1e3, 0, 60, 1e-4, -1e-4]], device=device)
    with dispatch.backend("triton"):
        z, logdet = encode(far, torch.zeros(1, 3, device=device))
    expected = encode(far.double(), torch.zeros(1, 3, device=device).double())
    torch.testing.assert_close(z.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(logdet.double(), expected[1], rtol=1e-5, atol=1e-7)
    raw, u = (x.requires_grad_() for x in given("softplus", 2, 5, device=device, dtype=torch.float32))
    with dispatch.backend("triton"):
        (alone,) = torch.autograd.grad(encode(raw, u)[1].sum(), raw)
    assert not alone[..., 3:].any()
    assert alone[..., :3].all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_cuda():
    kernel_against_reference("cuda")
