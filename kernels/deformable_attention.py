"""The core of deformable attention (arXiv 2010.04159 eq. 2 and 3): sums of values read between the pixels of maps.

PIIP (arXiv 2406.04330) attends so from one map to another. Forward and backward are one pass of each level and make
nothing but the result and the gradients; eager PyTorch stores what it read at every point, and its products; see
`benchmarks/deformable_attention`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.kernels.dispatch import jit, use_triton

if TYPE_CHECKING:
    import triton.language as tl

ELEMENTS = 256  # of a tile


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """`out[b, q, m] = sum over levels and points of weight * value[b, level, m](location)`, heads side by side.

    Between pixels values are bilinear, beyond the outermost centres they fall to 0 within a pixel: a location `x` of a
    map of width W is at `x W - 0.5`, where pixel i is at i. Arithmetic is float32 at least. The kernel leaves float64
    to the reference and can be differentiated once, the reference as often as `grid_sample`.

    Args:
        value: Pixels `(B, S, M, d)` of M heads: the levels one after the other, each row by row.
        shapes: `(H, W)` of each level; S is the sum of their `H W`.
        locations: `(B, Q, M, L, P, 2)`, (x, y) from 0 to 1 over the map; any other is allowed. Best in float32: half
            precision does not tell pixels apart.
        weights: `(B, Q, M, L, P)`, taken as they are.

    Returns:
        `(B, Q, M d)` in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: in the kernel's backward, deterministic algorithms are asked for.
    """
    _check(value, shapes, locations, weights)
    if not _in_triton(value, locations, weights):
        return reference(value, shapes, locations, weights)
    return _deformable_attention(value, [side for shape in shapes for side in shape], locations, weights)


def reference(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The definition of `deformable_attention` in PyTorch."""
    parts = _levels(value, shapes, locations, weights)
    out = sum((F.grid_sample(maps, grid, align_corners=False) * weight).sum(2) for maps, grid, weight in parts)
    batch, queries, width = _out_shape(value, locations)
    return out.view(batch, width, queries).transpose(1, 2).to(value.dtype)


def backward_reference(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `value`, `locations` and `weights`."""
    (batch, _, heads, size), (queries, points) = value.shape, (locations.shape[1], locations.shape[4])
    grad = grad.to(_wide(value, locations, weights)).transpose(1, 2).reshape(batch * heads, size, 1, queries)
    found = []
    for maps, grid, weight in _levels(value, shapes, locations, weights):
        by_weight = (grad * F.grid_sample(maps, grid, align_corners=False)).sum(1)
        backward = torch.ops.aten.grid_sampler_2d_backward
        by_map, by_grid = backward(grad * weight, maps, grid, 0, 0, False, [True, True])
        found.append(
            (
                by_map.view(batch, heads, size, maps.shape[2] * maps.shape[3]).permute(0, 3, 1, 2),
                2 * by_grid.view(batch, heads, points, queries, 2).permute(0, 3, 1, 2, 4),
                by_weight.view(batch, heads, points, queries).permute(0, 3, 1, 2),
            )
        )
    by_maps, by_grids, by_weights = zip(*found)
    gradients = torch.cat(by_maps, 1), torch.stack(by_grids, 3), torch.stack(by_weights, 3)
    return tuple(x.to(given.dtype).contiguous() for x, given in zip(gradients, (value, locations, weights)))


def _levels(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each level maps `(B M, d, H, W)`, grid `(B M, P, Q, 2)` in [-1, 1] and weights `(B M, 1, P, Q)`.

    Queries are the last axis: on a CPU sums over the points take half the time of those over a last axis of points.
    """
    wide = _wide(value, locations, weights)
    parts = value.to(wide).split([height * width for height, width in shapes], 1)
    grids = (2 * locations.to(wide) - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    for part, shape, grid, weight in zip(parts, shapes, grids, weights.to(wide).permute(3, 0, 2, 4, 1)):
        maps = part.permute(0, 2, 3, 1).reshape(grid.shape[0], part.shape[3], *shape)
        yield maps, grid, weight.flatten(0, 1)[:, None]


def _wide(value: Tensor, locations: Tensor, weights: Tensor) -> torch.dtype:
    kind = torch.promote_types(value.dtype, torch.float32)
    return torch.promote_types(torch.promote_types(kind, locations.dtype), weights.dtype)


def _in_triton(value: Tensor, locations: Tensor, weights: Tensor) -> bool:
    return use_triton(value) and _wide(value, locations, weights) == torch.float32


def _check(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    fits = value.ndim == 4 and locations.ndim == 6 and weights.shape == locations.shape[:5]
    if not fits or locations.shape[5] != 2 or value.shape[::2] != locations.shape[:4:2]:
        found = ", ".join(str(tuple(x.shape)) for x in (value, locations, weights))
        expected = "(B, S, M, d), (B, Q, M, L, P, 2), (B, Q, M, L, P)"
        raise ValueError(f"deformable_attention: value, locations, weights {found}, expected {expected}")
    grids = ", ".join(f"{height}x{width}" for height, width in shapes)
    if not shapes or min(min(shape) for shape in shapes) < 1 or len(shapes) != locations.shape[3]:
        raise ValueError(f"deformable_attention: grids {grids or 'none'} for {locations.shape[3]} levels")
    places = sum(height * width for height, width in shapes)
    if places != value.shape[1]:
        raise ValueError(f"deformable_attention: {value.shape[1]} pixels of value, expected {places} of grids {grids}")


@torch.library.custom_op("penstock::deformable_attention", mutates_args=())
def _deformable_attention(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """`sides` are H and W of the first level, then those of the second and so on."""
    shapes = list(zip(sides[::2], sides[1::2]))
    if not _in_triton(value, locations, weights):
        return reference(value, shapes, locations, weights).contiguous()
    kind = value.dtype if len(shapes) == 1 else torch.float32
    out = torch.empty(_out_shape(value, locations), dtype=kind, device=value.device)
    _launch(value, shapes, locations, weights, out)
    return out.to(value.dtype)


@_deformable_attention.register_fake
def _(value, sides, locations, weights):
    return torch.empty(_out_shape(value, locations), dtype=value.dtype, device=value.device)


@torch.library.custom_op("penstock::deformable_attention_backward", mutates_args=())
def _deformable_attention_backward(
    value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = list(zip(sides[::2], sides[1::2]))
    if not _in_triton(value, locations, weights):
        return backward_reference(value, shapes, locations, weights, grad)
    _warn_of_order()
    by_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    by_locations, by_weights = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (locations, weights))
    _launch(value, shapes, locations, weights, grad.contiguous(), (by_value, by_locations, by_weights))
    return by_value.to(value.dtype), by_locations, by_weights


@_deformable_attention_backward.register_fake
def _(value, sides, locations, weights, grad):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (value, locations, weights))


def _keep(ctx, inputs, output):
    value, ctx.sides, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    found = _deformable_attention_backward(value, ctx.sides, locations, weights, grad)
    return found[0], None, found[1], found[2]


_deformable_attention.register_autograd(_backward, setup_context=_keep)


def _out_shape(value: Tensor, locations: Tensor) -> tuple[int, int, int]:
    return value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]


def _warn_of_order() -> None:
    """As PyTorch does for what adds in changing order, `grid_sample` on CUDA included."""
    if torch.are_deterministic_algorithms_enabled():
        text = "deformable_attention: the gradient of value adds in changing order, which is not deterministic"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(text)
        warnings.warn(text, stacklevel=2)


def _launch(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    out: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Writes `out`, or, of its gradient `out`, the `gradients`, of which the first holds zeros in float32."""
    value = value if value.stride(3) == 1 else value.contiguous()
    locations, weights = locations.contiguous(), weights.contiguous()
    (batch, _, heads, size), (queries, points) = value.shape, (locations.shape[1], locations.shape[4])
    padded = 1 << max(0, size - 1).bit_length()
    tile, start = max(1, ELEMENTS // padded), 0
    blocks = -(-queries * heads // tile)
    if not batch * blocks:
        return
    with torch.cuda.device_of(value):
        for level, (height, width) in enumerate(shapes):
            places = slice(start, start + height * width)
            own = (value[:, places], locations[:, :, :, level], weights[:, :, :, level])
            made = (out, out, out)
            if gradients is not None:
                made = (gradients[0][:, places], gradients[1][:, :, :, level], gradients[2][:, :, :, level])
            _kernel()[(batch * blocks,)](
                *own,
                out,
                *made,
                blocks,
                queries * heads,
                heads,
                height,
                width,
                len(shapes) * points,
                *value.stride()[:3],
                value.shape[1] * heads * size,
                SIZE=size,
                PADDED=padded,
                POINTS=points,
                ADD=level > 0,
                BACKWARD=gradients is not None,
                ROWS=tile,
            )
            start = places.stop


@cache
def _kernel():
    return jit(_sample_kernel, do_not_specialize=("blocks", "rows", "height", "width"), calls=(_pixel,))


def _pixel(x, y, height, width, keep):
    inside = keep & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return y.to(tl.int64) * width + x.to(tl.int64), inside


def _sample_kernel(
    value,
    locations,
    weights,
    out,
    grad_value,
    grad_locations,
    grad_weights,
    blocks,
    rows,
    heads,
    height,
    width,
    step,
    stride_b,
    stride_s,
    stride_m,
    grad_stride_b,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    POINTS: tl.constexpr,
    ADD: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
):
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    own = tl.arange(0, PADDED)[None]
    real, head, line = row < rows, (row % heads).to(tl.int64), batch * rows + row
    keep = real & (own < SIZE)
    source = value + batch * stride_b + head * stride_m + own
    total = tl.zeros([ROWS, PADDED], tl.float32)
    if ADD or BACKWARD:
        total = tl.load(out + line * SIZE + own, mask=keep, other=0).to(tl.float32)
    for point in tl.range(0, POINTS, loop_unroll_factor=4):
        at = line * step + point
        x = tl.load(locations + 2 * at, mask=real, other=0).to(tl.float32) * width - 0.5
        y = tl.load(locations + 2 * at + 1, mask=real, other=0).to(tl.float32) * height - 0.5
        weight = tl.load(weights + at, mask=real, other=0).to(tl.float32)
        left, top = tl.floor(x), tl.floor(y)
        right, bottom = x - left, y - top
        by_x, by_y, by_weight = right * 0, right * 0, right * 0
        for corner in tl.static_range(4):
            dx, dy = corner % 2, corner // 2
            share_x, share_y = (right if dx else 1 - right), (bottom if dy else 1 - bottom)
            place, inside = _pixel(left + dx, top + dy, height, width, keep)
            here = tl.load(source + place * stride_s, mask=inside, other=0).to(tl.float32)
            if BACKWARD:
                product = tl.sum(total * here, 1, keep_dims=True)
                by_x += (2 * dx - 1) * share_y * product
                by_y += (2 * dy - 1) * share_x * product
                by_weight += share_x * share_y * product
                to = grad_value + batch * grad_stride_b + (place * heads + head) * SIZE + own
                tl.atomic_add(to, share_x * share_y * weight * total, mask=inside, sem="relaxed")
            else:
                total += share_x * share_y * weight * here
        if BACKWARD:
            kind = grad_locations.dtype.element_ty
            tl.store(grad_locations + 2 * at, (by_x * weight * width).to(kind), mask=real)
            tl.store(grad_locations + 2 * at + 1, (by_y * weight * height).to(kind), mask=real)
            tl.store(grad_weights + at, by_weight.to(grad_weights.dtype.element_ty), mask=real)
    if not BACKWARD:
        tl.store(out + line * SIZE + own, total.to(out.dtype.element_ty), mask=keep)
