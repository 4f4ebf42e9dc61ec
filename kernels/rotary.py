"""Rotation of queries and keys by their places (arXiv 2104.09864): one pass forward, one backward.

In eager PyTorch ten passes, most of them in float32, move about ten times the bytes; see `benchmarks/starflow_kernels`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.kernels.dispatch import jit, use_triton

if TYPE_CHECKING:
    import triton.language as tl

ROWS = 8


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool = False) -> Tensor:
    """Rotates pairs of features of `x`; in float32 at least, the result has the dtype of `x`.

    The kernel takes four axes, and leaves float64 to the reference; it can be differentiated once.

    Args:
        x: Queries or keys `(B, heads, N, h)`.
        cos: Cosines `(N, h / 2)` of the angles.
        sin: Sines.
        halves: Whether feature i is paired with `i + h / 2`, or with its neighbour.

    Raises:
        ValueError: for the kernel, other shapes.
    """
    if not use_triton(x) or x.dtype == torch.float64:
        return reference(x, cos, sin, halves)
    if x.ndim != 4 or cos.shape != (x.shape[2], x.shape[3] // 2) or sin.shape != cos.shape:
        raise ValueError(f"rotate: {tuple(x.shape)} by {tuple(cos.shape)}, expected (B, heads, N, h) by (N, h / 2)")
    return _rotate(x, cos, sin, halves, False)


def reference(x: Tensor, cos: Tensor, sin: Tensor, halves: bool = False, back: bool = False) -> Tensor:
    """The definition of `rotate` in PyTorch, for `x` `(..., N, h)`; `back` is by the negative angles.

    Neighbours are complex numbers times `cos + i sin`, in one pass; compiled code, which cannot, writes it out.
    """
    sin = -sin if back else sin
    wide = torch.promote_types(x.dtype, cos.dtype)
    if not halves and not torch.compiler.is_compiling():
        pairs = x.to(wide).unflatten(-1, (-1, 2)).contiguous()
        turn = torch.complex(cos.to(wide), sin.to(wide))
        return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(x.dtype)
    pairs = x.unflatten(-1, (2, -1)) if halves else x.unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-2 if halves else -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return (torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)).to(x.dtype)


@torch.library.custom_op("penstock::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, back: bool) -> Tensor:
    return (_triton if use_triton(x) else reference)(x, cos, sin, halves, back).contiguous()


@_rotate.register_fake
def _(x, cos, sin, halves, back):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep(ctx, inputs, output):
    _, cos, sin, ctx.halves, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    return _rotate(grad, *ctx.saved_tensors, ctx.halves, not ctx.back), None, None, None, None


_rotate.register_autograd(_backward, setup_context=_keep)


def _triton(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, back: bool) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, heads, places, size = x.shape
    if out.numel():
        with torch.cuda.device_of(x):
            _kernel()[(-(-batch * heads * places // ROWS),)](
                x,
                cos.contiguous(),
                sin.contiguous(),
                out,
                batch * heads * places,
                heads,
                places,
                *x.stride()[:3],
                SIZE=size,
                PADDED=1 << (size - 1).bit_length(),
                HALVES=halves,
                BACK=back,
                ROWS=ROWS,
                enable_fp_fusion=False,
            )
    return out


@cache
def _kernel():
    return jit(_rotate_kernel)


def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    rows,
    heads,
    places,
    stride_b,
    stride_h,
    stride_n,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HALVES: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    place = row % places
    source = x + row // (heads * places) * stride_b + row // places % heads * stride_h + place * stride_n
    own = tl.arange(0, PADDED)[None]
    if HALVES:
        pair, partner = own % (SIZE // 2), (own + SIZE // 2) % SIZE
        sign = tl.where(own < SIZE // 2, -1.0, 1.0)
    else:
        pair, partner = own // 2, own ^ 1
        sign = tl.where(own % 2 == 0, -1.0, 1.0)
    if BACK:
        sign = -sign
    keep = (row < rows) & (own < SIZE)
    a = tl.load(source + own, mask=keep, other=0).to(tl.float32)
    b = tl.load(source + partner, mask=keep, other=0).to(tl.float32)
    c = tl.load(cos + place * (SIZE // 2) + pair, mask=keep, other=0).to(tl.float32)
    s = tl.load(sin + place * (SIZE // 2) + pair, mask=keep, other=0).to(tl.float32)
    tl.store(out + row * SIZE + own, (a * c + b * s * sign).to(out.dtype.element_ty), mask=keep)
