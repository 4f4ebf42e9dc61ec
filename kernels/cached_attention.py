"""Attention of new tokens to themselves and to a cache of rotated keys and of values, for decoding.

Keys are rotated (arXiv 2104.09864) once, when they are written: places do not change, so that a sweep reads the cache
as it is. Two passes: the new keys and values into the cache; then online softmax (arXiv 1805.02867, 2205.14135) over
the cache in its own dtype. Grouped queries (arXiv 2305.13245) share what was read; where there are few heads, parts of
the cache are read side by side, and put together in a third pass.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.kernels import rotary
from penstock.kernels.dispatch import jit, use_triton

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = 256
PARTS = 32
ROWS = 8


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    halves: bool = False,
    temperature: Tensor | None = None,
) -> Tensor:
    """Writes n tokens into the cache at `start`; each sees what is before `start`, itself and those before it.

    The kernel has no gradient, and leaves float64 and heads wider than 256 to the reference. An empty cache (`start` 0)
    is left to PyTorch's causal attention.

    Args:
        query: Before rotation `(B, heads, n, h)`.
        key: Before rotation `(B, kv_heads, n, h)`, in the dtype of `query`; `kv_heads` divides `heads`.
        value: Of the shape and dtype of `key`.
        keys: Cache of rotated keys `(B, kv_heads, N, h)` in any dtype, N at least `start + n`; written.
        values: Cache of values, likewise.
        start: Place of the first token.
        cos: Cosines `(at least start + n, h / 2)` of all places; None is no rotation.
        sin: Sines.
        halves: See `rotary.rotate`.
        temperature: `(B, 1, 1, 1)`, which divides the logits of a sample.

    Returns:
        `(B, heads, n, h)` in the dtype of `value`.

    Raises:
        RuntimeError: for the kernel, tensors that want a gradient.
    """
    given = (query, key, value, keys, values, start, cos, sin, halves, temperature)
    if not use_triton(query) or query.dtype == torch.float64 or query.shape[3] > WIDEST:
        return reference(*given)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise RuntimeError("cached attention has no gradient: decode under torch.no_grad()")
    return _cached_attention(*given)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    cos: Tensor | None,
    sin: Tensor | None,
    halves: bool,
    temperature: Tensor | None,
) -> Tensor:
    """The definition of `cached_attention` in PyTorch."""
    n, end = query.shape[2], start + query.shape[2]
    if temperature is not None:
        query = query / temperature
    if cos is not None:
        query, key = (rotary.reference(x, cos[start:end], sin[start:end], halves) for x in (query, key))
    keys[:, :, start:end], values[:, :, start:end] = key, value
    mask = None
    if start and n > 1:
        mask = torch.ones(n, end, dtype=torch.bool, device=query.device).tril(start)
    return _sdpa(query.to(value.dtype), keys[:, :, :end], values[:, :, :end], mask, start == 0)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    grouped = query.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(query, keys, values, mask, 0.0, causal, enable_gqa=grouped)


@torch.library.custom_op("penstock::cached_attention", mutates_args=("keys", "values"))
def _cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    cos: Tensor | None,
    sin: Tensor | None,
    halves: bool,
    temperature: Tensor | None,
) -> Tensor:
    given = (query, key, value, keys, values, start, cos, sin, halves, temperature)
    return (_triton if use_triton(query) else reference)(*given).contiguous()


@_cached_attention.register_fake
def _(query, key, value, keys, values, start, cos, sin, halves, temperature):
    return torch.empty(query.shape, dtype=value.dtype, device=query.device)


def _triton(query, key, value, keys, values, start, cos, sin, halves, temperature):
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    (batch, heads, n, size), groups = query.shape, keys.shape[1]
    end, share, padded = start + n, heads // groups, max(16, 1 << (size - 1).bit_length())
    out = torch.empty(query.shape, dtype=value.dtype, device=query.device)
    if not out.numel():
        return out
    rotated = {"SIZE": size, "PADDED": padded, "HALVES": halves, "ROTATED": cos is not None}
    with torch.cuda.device_of(query):
        store, attend, combine = _kernels()
        store[(math.ceil(batch * groups * n / ROWS),)](
            key, value, keys, values, cos, sin, batch * groups * n, groups, n, start,
            *key.stride()[:3], *value.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            ROWS=ROWS, **rotated,
        )  # fmt: skip
        if start == 0:
            query = query if temperature is None else query / temperature
            if cos is not None:
                query = rotary._triton(query, cos[:n], sin[:n], halves, False)
            return _sdpa(query.to(value.dtype), keys[:, :, :end], values[:, :, :end], None, True)
        height, width, stages = tiles(share * n, padded, query.element_size(), keys.element_size())
        blocks = math.ceil(share * n / height)
        parts = _parts(blocks * batch * groups, math.ceil(end / width), query.device)
        length = math.ceil(end / parts / width) * width
        found, tops, sums = out, out, out
        if parts > 1:
            found = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
            tops, sums = (torch.empty(found.shape[:-1], dtype=torch.float32, device=out.device) for _ in range(2))
        if temperature is not None:
            temperature = temperature.reshape(batch).float()
        attend[(blocks, batch * groups, parts)](
            query, keys, values, cos, sin, temperature, found, tops, sums, heads, groups, n, start, length,
            *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            SCALE=size**-0.5 / math.log(2), SHARE=share, HEIGHT=height, WIDTH=width, SPLIT=parts > 1,
            HEATED=temperature is not None, num_stages=stages, **rotated,
        )  # fmt: skip
        if parts > 1:
            rows = batch * heads * n
            combine[(rows,)](found, tops, sums, out, rows, parts, SIZE=size, PADDED=padded)
    return out


def tiles(rows: int, padded: int, new: int, kept: int) -> tuple[int, int, int]:
    """Rows and keys of a tile, and tiles in flight, for heads of `padded` numbers, `new` and `kept` bytes each."""
    height = min(64, 16384 // (padded * new), max(16, 1 << (rows - 1).bit_length()))
    return height, min(64, max(16, 8192 // (padded * kept))), 2 if padded * kept >= 512 else 3


def _parts(programs: int, blocks: int, device: torch.device) -> int:
    """Into how many parts the cache is cut, so that twice as many programs run as the device has processors."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(PARTS, 2 * processors // programs, blocks // 4))


@cache
def _kernels():
    store = jit(_store_kernel, do_not_specialize=("n", "start"), calls=(_turned,))
    attend = jit(_attend_kernel, do_not_specialize=("n", "start", "length"))
    return store, attend, jit(_combine_kernel, do_not_specialize=("rows", "parts"))


def _turned(source, own, keep, cos, sin, place, SIZE: tl.constexpr, HALVES: tl.constexpr, ROTATED: tl.constexpr):
    x = tl.load(source + own, mask=keep, other=0).to(tl.float32)
    if ROTATED:
        if HALVES:
            pair, partner = own % (SIZE // 2), (own + SIZE // 2) % SIZE
            sign = tl.where(own < SIZE // 2, -1.0, 1.0)
        else:
            pair, partner = own // 2, own ^ 1
            sign = tl.where(own % 2 == 0, -1.0, 1.0)
        other = tl.load(source + partner, mask=keep, other=0).to(tl.float32)
        c = tl.load(cos + place * (SIZE // 2) + pair, mask=keep, other=0).to(tl.float32)
        s = tl.load(sin + place * (SIZE // 2) + pair, mask=keep, other=0).to(tl.float32)
        x = x * c + other * s * sign
    return x


def _store_kernel(
    key,
    value,
    keys,
    values,
    cos,
    sin,
    rows,
    groups,
    n,
    start,
    kb,
    kh,
    kn,
    vb,
    vh,
    vn,
    kcb,
    kch,
    kcn,
    vcb,
    vch,
    vcn,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HALVES: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    own = tl.arange(0, PADDED)[None]
    keep = (row < rows) & (own < SIZE)
    i, group, batch = row % n, row // n % groups, row // (n * groups)
    place = start + i
    turned = _turned(key + batch * kb + group * kh + i * kn, own, keep, cos, sin, place, SIZE, HALVES, ROTATED)
    turned = turned.to(key.dtype.element_ty).to(keys.dtype.element_ty)
    tl.store(keys + batch * kcb + group * kch + place * kcn + own, turned, mask=keep)
    new = tl.load(value + batch * vb + group * vh + i * vn + own, mask=keep, other=0)
    tl.store(values + batch * vcb + group * vch + place * vcn + own, new.to(values.dtype.element_ty), mask=keep)


def _attend_kernel(
    query,
    keys,
    values,
    cos,
    sin,
    temperature,
    found,
    tops,
    sums,
    heads,
    groups,
    n,
    start,
    length,
    qb,
    qh,
    qn,
    kb,
    kh,
    kn,
    vb,
    vh,
    vn,
    SCALE: tl.constexpr,
    SHARE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    HEATED: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    HALVES: tl.constexpr,
    ROTATED: tl.constexpr,
):
    batch, group = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    row = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    own, head, place = tl.arange(0, PADDED)[None], group * SHARE + row // n, start + row % n
    fits = own < SIZE
    keep = (row < SHARE * n)[:, None] & fits
    source = query + batch * qb + head[:, None] * qh + (row % n)[:, None] * qn
    q = _turned(source, own, keep, cos, sin, place[:, None], SIZE, HALVES, ROTATED)
    if HEATED:
        q = q / tl.load(temperature + batch)
    q = q.to(query.dtype.element_ty)
    top = tl.full([HEIGHT], float("-inf"), tl.float32)
    total = tl.zeros([HEIGHT], tl.float32)
    mean = tl.zeros([HEIGHT, PADDED], tl.float32)
    begin = tl.program_id(2) * length
    stop = tl.minimum(begin + length, start + n)
    for at in range(begin, stop, WIDTH):
        other = at + tl.arange(0, WIDTH)
        inside = other < stop
        from_key = keys + batch * kb + group * kh + other[:, None] * kn + own
        k = tl.load(from_key, mask=inside[:, None] & fits, other=0).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * SCALE
        logits = tl.where(inside[None] & (other[None] <= place[:, None]), logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, shrink = tl.exp2(logits - base[:, None]), tl.exp2(top - base)
        from_value = values + batch * vb + group * vh + other[:, None] * vn + own
        v = tl.load(from_value, mask=inside[:, None] & fits, other=0).to(q.dtype)
        mean = mean * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="tf32x3")
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    line = (batch * heads + head) * n + row % n
    if SPLIT:
        line += tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // groups * heads * n)
        tl.store(tops + line, top, mask=row < SHARE * n)
        tl.store(sums + line, total, mask=row < SHARE * n)
    else:
        mean = mean / total[:, None]
    tl.store(found + line[:, None] * SIZE + own, mean.to(found.dtype.element_ty), mask=keep)


def _combine_kernel(found, tops, sums, out, rows, parts, SIZE: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, PADDED)
    top = tl.load(tops + row)
    for part in range(1, parts):
        top = tl.maximum(top, tl.load(tops + row + part * rows))
    total, mean = top * 0, tl.zeros([PADDED], tl.float32)
    for part in range(parts):
        line = row + part * rows
        weight = tl.exp2(tl.load(tops + line) - top)
        total += weight * tl.load(sums + line)
        mean += weight * tl.load(found + line * SIZE + own, mask=own < SIZE, other=0)
    tl.store(out + row * SIZE + own, (mean / total).to(out.dtype.element_ty), mask=own < SIZE)
