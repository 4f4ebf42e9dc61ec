"""The affine coupling of FastFlow's steps (arXiv 2111.07677; FrEIA's AllInOneBlock), its inverse and its gradients.

One pass each in Triton, and on the CPU in parts that stay in the cache; arithmetic is float32 at least. Backward keeps
`u`, which convolutions keep anyway, and `a`; eager PyTorch twice as much instead of `a`; see
`benchmarks/fastflow_kernels`. Maps may be channels-last, and results are then, too; on the CPU that is the slower
format, in which no half of the channels is one block.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from penstock.kernels import _coupling_cpu as cpu
from penstock.kernels._coupling_cpu import SOFT, by_log_gain, channels_last, column, empty, log_gain, slope_of, wide_of
from penstock.kernels.dispatch import jit, use_triton

if TYPE_CHECKING:
    import triton.language as tl

Form = Literal["tanh", "tanh_over_clamp"]
SMALL = 2**16  # elements of a map below which calls cost more than passes on the CPU
SIZE = 1024  # elements of a tile
REACH = 32  # places at least that share a partial sum of backward
FORWARD, INVERSE, BACKWARD = range(3)


def couple(
    u: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, clamp: float, form: Form = "tanh"
) -> tuple[Tensor, Tensor]:
    """`out = (v g + offset)[:, perm]` with `v = (u1, u2 exp(s) + t)`, and the log-determinant.

    `s = clamp tanh(0.1 a)` and `t = 0.1 a` of the two halves of `a`. It can be differentiated once; `reference`, which
    is also what exported and, on the CPU, compiled programs hold and what small maps go through there, as often as one
    likes.

    Args:
        u: Maps `(B, C, H, W)`; the first `C - C // 2` channels, u1, pass, the others are u2.
        a: The subnet's output of u1, `(B, 2 (C // 2), H, W)`, of any dtype and strides.
        g: Gains > 0 of the channels of `v`, `(C,)`.
        offset: Their offsets `(C,)`.
        perm: Channel of `v` that each channel of `out` shows, int64 `(C,)`.
        clamp: Bound of s.
        form: `tanh` (FrEIA until August 2023, gathierry, anomalib) or `tanh_over_clamp`, `clamp tanh(0.1 a / clamp)`.

    Returns:
        `out` in the dtype of `u`, and `sum s + H W sum log g` of each sample, `(B,)`, float32 at least.

    Raises:
        ValueError: shapes that do not fit, or another form.
    """
    _check(u, a, g, offset, perm, form)
    if is_exporting() or (not use_triton(u) and (is_compiling() or (u.is_cpu and u.numel() < SMALL))):
        return reference(u, a, g, offset, perm, clamp, form)
    return _couple(u, a, g, offset, perm, clamp, form)


def decouple(
    out: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, clamp: float, form: Form = "tanh"
) -> tuple[Tensor, Tensor]:
    """`u` of `couple`'s `out`, and the log-determinant of this way, the negative of the other; arguments as there.

    `a` is the subnet's output of `passive(out, ...)`. Gradients, where they are asked for, are those of
    `inverse_reference` by autograd.

    Raises:
        ValueError: shapes that do not fit, or another form.
    """
    _check(out, a, g, offset, perm, form)
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (out, a, g, offset))
    if graded or is_exporting() or not use_triton(out):
        return inverse_reference(out, a, g, offset, perm, clamp, form)
    return _decouple(out, a, g, offset, perm, clamp, form)


def passive(out: Tensor, g: Tensor, offset: Tensor, perm: Tensor) -> Tensor:
    """u1 `(B, C - C // 2, H, W)` of `couple`'s `out`; arguments as there."""
    wide, n = wide_of(out), len(perm) - len(perm) // 2
    u1 = _channels(out.to(wide), perm.argsort()[:n])
    return ((u1 - column(offset[:n], wide)) / column(g[:n], wide)).to(out.dtype)


def reference(
    u: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, clamp: float, form: Form = "tanh"
) -> tuple[Tensor, Tensor]:
    """The definition of `couple` in PyTorch: plain operators, for export and for derivatives of any order."""
    s, t = _law(a, clamp, form, wide_of(u, a))
    u1, u2 = u.to(s.dtype).split([u.shape[1] - s.shape[1], s.shape[1]], 1)
    v = torch.cat([u1, u2 * s.exp() + t], 1)
    out = _channels(v * column(g, s.dtype) + column(offset, s.dtype), perm)
    return out.to(u.dtype), s.sum((1, 2, 3)) + log_gain(u, g, s.dtype)


def inverse_reference(
    out: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, clamp: float, form: Form = "tanh"
) -> tuple[Tensor, Tensor]:
    """The definition of `decouple` in PyTorch."""
    s, t = _law(a, clamp, form, wide_of(out, a))
    v = (_channels(out.to(s.dtype), perm.argsort()) - column(offset, s.dtype)) / column(g, s.dtype)
    v1, v2 = v.split([out.shape[1] - s.shape[1], s.shape[1]], 1)
    u = torch.cat([v1, (v2 - t) * (-s).exp()], 1)
    return u.to(out.dtype), -s.sum((1, 2, 3)) - log_gain(out, g, s.dtype)


def _law(a: Tensor, clamp: float, form: str, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    s, t = (SOFT * a.to(wide)).chunk(2, 1)
    return clamp * torch.tanh(s if form == "tanh" else s / clamp), t


def _channels(x: Tensor, index: Tensor) -> Tensor:
    """`x[:, index]` in the format of `x`: a gather along rows of channels is fast in a matrix only."""
    if is_exporting() or not channels_last(x):
        return x.index_select(1, index)
    rows = x.permute(0, 2, 3, 1)
    return rows.flatten(0, 2).index_select(1, index).view(*rows.shape[:3], len(index)).permute(0, 3, 1, 2)


def _check(u: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, form: str) -> None:
    if u.ndim != 4 or a.shape != (u.shape[0], u.shape[1] // 2 * 2, *u.shape[2:]):
        raise ValueError(f"couple: a {tuple(a.shape)} for maps {tuple(u.shape)}, expected (B, 2 (C // 2), H, W)")
    if not g.shape == offset.shape == perm.shape == u.shape[1:2]:
        found = ", ".join(str(tuple(x.shape)) for x in (g, offset, perm))
        raise ValueError(f"couple: g, offset, perm {found} for {u.shape[1]} channels, expected ({u.shape[1]},) of each")
    if form not in get_args(Form):
        raise ValueError(f"couple: form '{form}', expected one of {', '.join(get_args(Form))}")


@torch.library.custom_op("penstock::couple", mutates_args=())
def _couple(
    u: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, clamp: float, form: str
) -> tuple[Tensor, Tensor]:
    if not use_triton(u):
        return cpu.forward(u, a, g, offset, perm, clamp, form)
    out = empty(u.shape, u)
    sums = _launch(FORWARD, u, a, g, offset, perm, out, clamp, form)
    return out, sums.sum(1) + log_gain(u, g, sums.dtype)


@_couple.register_fake
def _(u, a, g, offset, perm, clamp, form):
    return empty(u.shape, u), u.new_empty(u.shape[0], dtype=wide_of(u, a))


@torch.library.custom_op("penstock::couple_backward", mutates_args=())
def _couple_backward(
    u: Tensor, a: Tensor, g: Tensor, perm: Tensor, grad_out: Tensor, grad_logdet: Tensor, clamp: float, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `u`, `a`, `g` and the offset; the last two in the arithmetic's dtype."""
    backward = _backward_on_device if use_triton(u) else cpu.backward
    return backward(u, a, g, perm, grad_out, grad_logdet, clamp, form)


@_couple_backward.register_fake
def _(u, a, g, perm, grad_out, grad_logdet, clamp, form):
    return empty(u.shape, u), empty(a.shape, u, a.dtype), *(g.new_empty(g.shape, dtype=wide_of(u, a)) for _ in range(2))


def _keep(ctx, inputs, output):
    u, a, g, offset, perm, ctx.clamp, ctx.form = inputs
    ctx.offset_dtype = offset.dtype
    ctx.save_for_backward(u, a, g, perm)


def _backward(ctx, grad_out, grad_logdet):
    found = _couple_backward(*ctx.saved_tensors, grad_out, grad_logdet, ctx.clamp, ctx.form)
    return *found[:2], found[2].to(ctx.saved_tensors[2].dtype), found[3].to(ctx.offset_dtype), None, None, None


_couple.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("penstock::decouple", mutates_args=())
def _decouple(
    out: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, clamp: float, form: str
) -> tuple[Tensor, Tensor]:
    if not use_triton(out):
        return inverse_reference(out, a, g, offset, perm, clamp, form)
    u = empty(out.shape, out)
    sums = _launch(INVERSE, out, a, g, offset, perm.argsort(), u, clamp, form)
    return u, -sums.sum(1) - log_gain(out, g, sums.dtype)


@_decouple.register_fake
def _(out, a, g, offset, perm, clamp, form):
    return empty(out.shape, out), out.new_empty(out.shape[0], dtype=wide_of(out, a))


def _backward_on_device(
    u: Tensor, a: Tensor, g: Tensor, perm: Tensor, grad_out: Tensor, grad_logdet: Tensor, clamp: float, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_u, grad_a = empty(u.shape, u), empty(a.shape, u, a.dtype)
    found = _launch(BACKWARD, u, a, g, g, perm.argsort(), grad_u, clamp, form, grad_out, grad_logdet, grad_a)
    by_g, grad_offset = found.sum(1)
    return grad_u, grad_a, by_g + by_log_gain(u, g, grad_logdet, found.dtype), grad_offset


def _launch(
    mode: int,
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    index: Tensor,
    y: Tensor,
    clamp: float,
    form: str,
    grad_out: Tensor | None = None,
    grad_logdet: Tensor | None = None,
    grad_a: Tensor | None = None,
) -> Tensor:
    """Runs the kernel, tiles along the axis whose neighbours are neighbours in memory; see there for what it takes.

    Returns:
        Partial sums: of s `(B, programs of a sample)`, or, of backward, for g and the offset `(2, programs, C)`.
    """
    last, wide = channels_last(x), wide_of(x, a)
    batch, channels, places = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    height, width = tile(channels, places, last)
    steps = max(1, min(-(-places // width), -(-REACH // width))) if mode == BACKWARD else 1
    rows, columns = -(-channels // height), -(-places // (width * steps))
    shape = (2, batch * columns, channels) if mode == BACKWARD else (batch, rows * columns)
    if not x.numel():
        return torch.zeros(shape, dtype=wide, device=x.device)
    sums = torch.empty(shape, dtype=wide, device=x.device)
    grad_out, grad_a = (x if grad_out is None else grad_out), (y if grad_a is None else grad_a)
    maps = [m.flatten(2) for m in (x, a, grad_out)]
    vectors = (v.contiguous() for v in (g if grad_logdet is None else grad_logdet, g, offset, index))
    with torch.cuda.device_of(x):
        _kernel()[(batch * rows * columns,)](
            *maps,
            y,
            grad_a,
            *vectors,
            sums,
            batch,
            channels,
            places,
            rows,
            columns,
            *(stride for m in maps for stride in m.stride()),
            CLAMP=clamp,
            SLOPE=slope_of(clamp, form),
            SOFT=SOFT,
            MODE=mode,
            LAST=last,
            DOUBLE=wide == torch.float64,
            HEIGHT=height,
            WIDTH=width,
            STEPS=steps,
        )
    return sums


def tile(channels: int, places: int, last: bool) -> tuple[int, int]:
    """Channels and places of a tile: powers of two, the whole of the axis that is contiguous where it fits."""
    inner = min(SIZE, 1 << max(0, (channels if last else places) - 1).bit_length())
    outer = min(SIZE // inner, 1 << max(0, (places if last else channels) - 1).bit_length())
    return (inner, outer) if last else (outer, inner)


@cache
def _kernel():
    return jit(_coupling_kernel)


def _coupling_kernel(
    x,
    a,
    grad_out,
    y,
    grad_a,
    grad_logdet,
    gain,
    offset,
    index,
    sums,
    batch,
    channels,
    places,
    rows,
    columns,
    xb,
    xc,
    xp,
    ab,
    ac,
    ap,
    gb,
    gc,
    gp,
    CLAMP: tl.constexpr,
    SLOPE: tl.constexpr,
    SOFT: tl.constexpr,
    MODE: tl.constexpr,
    LAST: tl.constexpr,
    DOUBLE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    wide = tl.float64 if DOUBLE else tl.float32
    axis: tl.constexpr = 0 if LAST else 1
    program = tl.program_id(0)
    column, row, b = program % columns, program // columns % rows, (program // columns // rows).to(tl.int64)
    c = row * HEIGHT + tl.arange(0, HEIGHT)
    there = tl.load(index + c, mask=c < channels, other=0).to(tl.int32)
    source = there if MODE == 0 else c
    g = tl.load(gain + source, mask=c < channels, other=1.0).to(wide)
    shift = tl.load(offset + source, mask=c < channels, other=0).to(wide)
    at = tl.expand_dims(c, axis)
    there, source = tl.expand_dims(there, axis), tl.expand_dims(source, axis)
    g, shift = tl.expand_dims(g, axis), tl.expand_dims(shift, axis)
    half, first = channels // 2, channels - channels // 2
    shape: tl.constexpr = (WIDTH, HEIGHT) if LAST else (HEIGHT, WIDTH)
    total, other = tl.zeros(shape, wide), tl.zeros(shape, wide)
    for step in range(STEPS):
        p = tl.expand_dims((column * STEPS + step) * WIDTH + tl.arange(0, WIDTH), 1 - axis)
        keep = (at < channels) & (p < places)
        active = keep & (source >= first)
        at_s = b * ab + (source - first) * ac + p * ap
        raw = tl.load(a + at_s, mask=active, other=0).to(wide)
        t = SOFT * tl.load(a + at_s + half * ac, mask=active, other=0).to(wide)
        bent = 2 / (1 + tl.exp(-2 * SLOPE * raw)) - 1
        s = tl.where(active, CLAMP * bent, 0.0)
        here = tl.load(x + b * xb + (at if MODE == 2 else there) * xc + p * xp, mask=keep, other=0).to(wide)
        if MODE == 0:
            made = (here * tl.exp(s) + t) * g + shift
            total += s
        elif MODE == 1:
            made = ((here - shift) / g - t) * tl.exp(-s)
            total += s
        else:
            grad = tl.load(grad_out + b * gb + there * gc + p * gp, mask=keep, other=0).to(wide)
            stretched = here * tl.exp(s)
            total += grad * (stretched + t)
            other += grad
            grad *= g
            made = grad * tl.exp(s)
            grad_s = (grad * stretched + tl.load(grad_logdet + b).to(wide)) * (CLAMP * SLOPE) * (1 - bent * bent)
            at_s = p * (2 * half) + source - first if LAST else (source - first) * places + p
            at_t = at_s + half if LAST else at_s + half * places
            to = grad_a + b * (2 * half) * places
            tl.store(to + at_s, grad_s.to(grad_a.dtype.element_ty), mask=active)
            tl.store(to + at_t, (SOFT * grad).to(grad_a.dtype.element_ty), mask=active)
        at_y = p * channels + at if LAST else at * places + p
        tl.store(y + b * channels * places + at_y, made.to(y.dtype.element_ty), mask=keep)
    if MODE == 2:
        at_sums = sums + (b * columns + column) * channels + c
        tl.store(at_sums, tl.sum(total, axis), mask=c < channels)
        tl.store(at_sums + batch * columns * channels, tl.sum(other, axis), mask=c < channels)
    else:
        tl.store(sums + b * rows * columns + row * columns + column, tl.sum(tl.sum(total, 1), 0))
