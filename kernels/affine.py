"""Tokens through the affine map of an autoregressive flow (arXiv 2506.06276): laws, noise side and log-determinant.

One pass forward and one backward from the network's output, whose arithmetic is float32 whatever the network's dtype:
log-determinants are sums of many small numbers. Backward keeps the input only; eager PyTorch keeps ten tensors.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.kernels.dispatch import jit, use_triton

if TYPE_CHECKING:
    import triton.language as tl

Scale = Literal["softplus", "exp", "one"]
AT_ZERO = math.log(math.e - 1)
SIZE = 512


def moments(raw: Tensor, scale: Scale = "softplus", soft_clip: float = 4.0) -> tuple[Tensor, Tensor]:
    """`mu` and `sigma` `(..., C)` of a network's output `(..., 2 C)`, whose first half is the scale's.

    Args:
        raw: The output.
        scale: `sigma = softplus(a + log(e - 1))`, 1 at a = 0, or `exp(a)`, or 1 always, with an output `(..., C)`.
        soft_clip: c of `c tanh(raw / c)`, which bounds both; 0 is none.
    """
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if soft_clip:
        raw = soft_clip * torch.tanh(raw / soft_clip)
    if scale == "one":
        return raw, torch.ones_like(raw)
    a, mu = raw.chunk(2, -1)
    return mu, F.softplus(a + AT_ZERO) if scale == "softplus" else a.exp()


def encode(raw: Tensor, u: Tensor, scale: Scale = "softplus", soft_clip: float = 4.0) -> tuple[Tensor, Tensor]:
    """`z = (u - mu) / sigma` in the dtype of `u`, and `-log sigma` in float32 at least, both `(..., C)`.

    The kernel can be differentiated once, the reference as often as one likes.

    Args:
        raw: What `moments` takes.
        u: Tokens `(..., C)`.
        scale: See `moments`.
        soft_clip: See there.

    Raises:
        ValueError: an output that does not fit the tokens.
    """
    if raw.shape != (*u.shape[:-1], u.shape[-1] * (1 if scale == "one" else 2)):
        raise ValueError(f"encode: output {tuple(raw.shape)} of scale '{scale}' for tokens {tuple(u.shape)}")
    return _encode(raw, u, scale, soft_clip) if use_triton(raw) else reference(raw, u, scale, soft_clip)


def reference(raw: Tensor, u: Tensor, scale: Scale, soft_clip: float) -> tuple[Tensor, Tensor]:
    """The definition of `encode` in PyTorch."""
    mu, sigma = moments(raw, scale, soft_clip)
    return ((u - mu) / sigma).to(u.dtype), -sigma.log()


def backward_reference(
    raw: Tensor, u: Tensor, grad_z: Tensor, grad_logdet: Tensor, scale: Scale, soft_clip: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `raw` and `u`: `dz/du = 1 / sigma`, `dz/dmu = -1 / sigma`, `dz/dsigma = -z / sigma`.

    `sigma` goes on to `a` by `1 - exp(-sigma)`, the derivative of softplus, or by itself, the one of exp; the clip by
    `1 - tanh^2`.
    """
    mu, sigma = moments(raw, scale, soft_clip)
    grad_u = grad_z / sigma
    grad = -grad_u
    if scale != "one":
        slope = -torch.expm1(-sigma) if scale == "softplus" else sigma
        grad_a = -(grad_z * (u - mu) / sigma + grad_logdet) / sigma * slope
        grad = torch.cat([grad_a, grad], -1)
    if soft_clip:
        grad = grad * (1 - torch.tanh(raw.to(mu.dtype) / soft_clip).square())
    return grad.to(raw.dtype), grad_u.to(u.dtype)


@torch.library.custom_op("penstock::affine_encode", mutates_args=())
def _encode(raw: Tensor, u: Tensor, scale: str, soft_clip: float) -> tuple[Tensor, Tensor]:
    if not use_triton(raw):
        return reference(raw, u, scale, soft_clip)
    z, logdet = _like(raw, u)
    _launch(raw, u, z, logdet, z, logdet, scale, soft_clip, False)
    return z, logdet


@_encode.register_fake
def _(raw, u, scale, soft_clip):
    return _like(raw, u)


@torch.library.custom_op("penstock::affine_encode_backward", mutates_args=())
def _encode_backward(
    raw: Tensor, u: Tensor, grad_z: Tensor, grad_logdet: Tensor, scale: str, soft_clip: float
) -> tuple[Tensor, Tensor]:
    if not use_triton(raw):
        return backward_reference(raw, u, grad_z, grad_logdet, scale, soft_clip)
    grad_raw, grad_u = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (raw, u))
    _launch(raw, u, grad_z, grad_logdet, grad_u, grad_raw, scale, soft_clip, True)
    return grad_raw, grad_u


@_encode_backward.register_fake
def _(raw, u, grad_z, grad_logdet, scale, soft_clip):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (raw, u))


def _keep(ctx, inputs, output):
    raw, u, ctx.scale, ctx.soft_clip = inputs
    ctx.save_for_backward(raw, u)


def _backward(ctx, grad_z, grad_logdet):
    return *_encode_backward(*ctx.saved_tensors, grad_z, grad_logdet, ctx.scale, ctx.soft_clip), None, None


_encode.register_autograd(_backward, setup_context=_keep)


def _like(raw: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(raw.dtype, torch.float32)
    return tuple(torch.empty(u.shape, dtype=dtype, device=u.device) for dtype in (u.dtype, wide))


def _launch(
    raw: Tensor,
    u: Tensor,
    in_z: Tensor,
    in_logdet: Tensor,
    out_u: Tensor,
    out_raw: Tensor,
    scale: str,
    soft_clip: float,
    backward: bool,
) -> None:
    if u.numel():
        with torch.cuda.device_of(u):
            _kernel()[(-(-u.numel() // SIZE),)](
                *(x.contiguous() for x in (raw, u, in_z, in_logdet)),
                out_u,
                out_raw,
                u.numel(),
                u.shape[-1],
                SCALE=get_args(Scale).index(scale),
                CLIP=soft_clip,
                AT_ZERO=AT_ZERO,
                DOUBLE=torch.float64 in (raw.dtype, u.dtype),
                BACKWARD=backward,
                SIZE=SIZE,
            )


@cache
def _kernel():
    return jit(_encode_kernel, calls=(_tanh, _log1p))


def _tanh(x):
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    square = x * x
    small = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    return tl.where(size < 0.1, small, tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e))


def _log1p(x):
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1.0, y - 1)))


def _encode_kernel(
    raw,
    u,
    in_z,
    in_logdet,
    out_u,
    out_raw,
    total,
    channels,
    SCALE: tl.constexpr,
    CLIP: tl.constexpr,
    AT_ZERO: tl.constexpr,
    DOUBLE: tl.constexpr,
    BACKWARD: tl.constexpr,
    SIZE: tl.constexpr,
):
    wide = tl.float64 if DOUBLE else tl.float32
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    keep = place < total
    at_a = place // channels * (2 * channels) + place % channels
    at_mu = place if SCALE == 2 else at_a + channels
    x = tl.load(u + place, mask=keep, other=0).to(wide)
    mu = tl.load(raw + at_mu, mask=keep, other=0).to(wide)
    slope_mu, slope_a = mu * 0 + 1, mu * 0 + 1
    if CLIP > 0:
        bent = _tanh(mu / CLIP)
        mu, slope_mu = CLIP * bent, 1 - bent * bent
    sigma, logdet = mu * 0 + 1, mu * 0
    if SCALE != 2:
        a = tl.load(raw + at_a, mask=keep, other=0).to(wide)
        if CLIP > 0:
            bent = _tanh(a / CLIP)
            a, slope_a = CLIP * bent, 1 - bent * bent
        if SCALE == 0:
            a += AT_ZERO
            decay = tl.exp(-tl.abs(a))
            sigma = tl.maximum(a, 0.0) + _log1p(decay)
            slope_a *= tl.where(a < 0, decay, 1.0) / (1 + decay)
            logdet = -tl.log(sigma)
        else:
            sigma, logdet = tl.exp(a), -a
            slope_a *= sigma
    z = (x - mu) / sigma
    if BACKWARD:
        grad = tl.load(in_z + place, mask=keep, other=0).to(wide) / sigma
        tl.store(out_u + place, grad.to(out_u.dtype.element_ty), mask=keep)
        tl.store(out_raw + at_mu, (-grad * slope_mu).to(out_raw.dtype.element_ty), mask=keep)
        if SCALE != 2:
            grad = grad * z + tl.load(in_logdet + place, mask=keep, other=0).to(wide) / sigma
            tl.store(out_raw + at_a, (-grad * slope_a).to(out_raw.dtype.element_ty), mask=keep)
    else:
        tl.store(out_u + place, z.to(out_u.dtype.element_ty), mask=keep)
        tl.store(out_raw + place, logdet.to(out_raw.dtype.element_ty), mask=keep)
