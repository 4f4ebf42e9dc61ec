"""An iterate of Jacobi inversion and how far it moved (arXiv 2511.20462), in place and in one pass."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.kernels.dispatch import jit, use_triton

if TYPE_CHECKING:
    import triton.language as tl

SIZE = 512


def update(u: Tensor, mu: Tensor, sigma: Tensor, z: Tensor, clamp: float = 0.0) -> Tensor:
    """Makes `u' = mu + sigma z` of `u`; returns `mean((u' - u)^2) / mean(u'^2)`, a scalar on the device.

    The kernel's sums have an order of their own, the same in every run, and no gradient.

    Args:
        u: Iterate `(B, n, C)`, of any strides; it is overwritten.
        mu: Means.
        sigma: Scales.
        z: Noise.
        clamp: Largest size of `u'`; 0 is none.

    Raises:
        ValueError: for the kernel, other shapes.
    """
    if not use_triton(u):
        return reference(u, mu, sigma, z, clamp)
    if u.ndim != 3 or not u.shape == mu.shape == sigma.shape == z.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (u, mu, sigma, z))
        raise ValueError(f"update: {shapes}, expected four of one shape (B, n, C)")
    return _update(u, mu, sigma, z, clamp)


def reference(u: Tensor, mu: Tensor, sigma: Tensor, z: Tensor, clamp: float) -> Tensor:
    """The definition of `update` in PyTorch."""
    new = mu + sigma * z
    if clamp:
        new = new.clamp(-clamp, clamp)
    residual = (new - u).square().mean() / new.square().mean()
    u.copy_(new)
    return residual


@torch.library.custom_op("penstock::jacobi_update", mutates_args=("u",))
def _update(u: Tensor, mu: Tensor, sigma: Tensor, z: Tensor, clamp: float) -> Tensor:
    return (_triton if use_triton(u) else reference)(u, mu, sigma, z, clamp)


@_update.register_fake
def _(u, mu, sigma, z, clamp):
    return mu.new_empty((), dtype=_wide(u, mu, sigma, z))


def _wide(*tensors: Tensor) -> torch.dtype:
    kind = tensors[0].dtype
    for x in tensors[1:]:
        kind = torch.promote_types(kind, x.dtype)
    return kind


def _triton(u: Tensor, mu: Tensor, sigma: Tensor, z: Tensor, clamp: float) -> Tensor:
    kind = _wide(u, mu, sigma, z)
    programs = -(-u.numel() // SIZE)
    inner = torch.promote_types(kind, torch.float32)
    sums = torch.zeros(2, programs, dtype=inner, device=u.device)
    if programs:
        with torch.cuda.device_of(u):
            _kernel()[(programs,)](
                u,
                mu,
                sigma,
                z,
                sums,
                u.numel(),
                *u.shape[1:],
                *(stride for x in (u, mu, sigma, z) for stride in x.stride()),
                programs,
                CLAMP=clamp,
                DOUBLE=inner == torch.float64,
                SIZE=SIZE,
            )
    moved, size = sums.sum(1)
    return (moved / size).to(kind)


@cache
def _kernel():
    return jit(_update_kernel, do_not_specialize=("total", "places"))


def _update_kernel(
    u,
    mu,
    sigma,
    z,
    sums,
    total,
    places,
    channels,
    ub,
    un,
    uc,
    mb,
    mn,
    mc,
    sb,
    sn,
    sc,
    zb,
    zn,
    zc,
    programs,
    CLAMP: tl.constexpr,
    DOUBLE: tl.constexpr,
    SIZE: tl.constexpr,
):
    wide = tl.float64 if DOUBLE else tl.float32
    element = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    keep = element < total
    c, n, b = element % channels, element // channels % places, element // channels // places
    old = tl.load(u + b * ub + n * un + c * uc, mask=keep, other=0).to(wide)
    mean = tl.load(mu + b * mb + n * mn + c * mc, mask=keep, other=0).to(wide)
    scale = tl.load(sigma + b * sb + n * sn + c * sc, mask=keep, other=0).to(wide)
    new = mean + scale * tl.load(z + b * zb + n * zn + c * zc, mask=keep, other=0).to(wide)
    if CLAMP > 0:
        limit = tl.full([SIZE], CLAMP, wide)
        new = tl.where(new > limit, limit, tl.where(new < -limit, -limit, new))
    tl.store(u + b * ub + n * un + c * uc, new.to(u.dtype.element_ty), mask=keep)
    moved = tl.where(keep, (new - old) * (new - old), 0.0)
    size = tl.where(keep, new * new, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(moved, 0))
    tl.store(sums + programs + tl.program_id(0), tl.sum(size, 0))
