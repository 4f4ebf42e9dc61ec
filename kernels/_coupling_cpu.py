"""`coupling` on the CPU: in parts that stay in the cache; and the formats of maps, for every way of computing it."""

from __future__ import annotations

import torch
from torch import Tensor

SOFT = 0.1  # of the subnet's output
PART = 2**18  # elements of a map that are taken at once


def slope_of(clamp: float, form: str) -> float:
    """Of the argument of tanh in `a`."""
    return SOFT if form == "tanh" else SOFT / clamp


def wide_of(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def column(x: Tensor, wide: torch.dtype) -> Tensor:
    return x.to(wide).view(-1, 1, 1)


def log_gain(u: Tensor, g: Tensor, wide: torch.dtype) -> Tensor:
    return u.shape[2] * u.shape[3] * g.to(wide).log().sum()


def channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def empty(shape: torch.Size, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory in the format of `like`."""
    format = torch.channels_last if channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=format)


def forward(
    u: Tensor, a: Tensor, g: Tensor, offset: Tensor, perm: Tensor, clamp: float, form: str
) -> tuple[Tensor, Tensor]:
    """In parts; `tanh(x) = 2 sigmoid(2 x) - 1`, whose error is one of rounding beside 1, takes a fifth of its time."""
    wide, n = wide_of(u, a), u.shape[1] - u.shape[1] // 2
    gain, shift = column(g, wide), column(offset, wide)
    base, slope = gain[n:].log() - clamp, 2 * slope_of(clamp, form)
    out, logdet = empty(u.shape, u), u.new_empty(u.shape[0], dtype=wide)
    for u_, a_, out_, logdet_ in _parts(u, a, out, logdet):
        u1, u2 = u_.to(wide).tensor_split([n], 1)
        raw, t = a_.to(wide).tensor_split([u2.shape[1]], 1)
        x = torch.mul(raw, slope).sigmoid_()
        torch.sum(torch.add(base, x, alpha=2 * clamp, out=x), (1, 2, 3), out=logdet_)
        w = empty(out_.shape, out, wide)
        torch.addcmul(shift[:n], u1, gain[:n], out=w[:, :n])
        torch.add(x.exp_().mul_(u2).addcmul_(t, SOFT * gain[n:]), shift[n:], out=w[:, n:])
        _gather(w, perm, out_)
    return out, logdet.add_(log_gain(u, g[:n], wide))


def backward(
    u: Tensor, a: Tensor, g: Tensor, perm: Tensor, grad_out: Tensor, grad_logdet: Tensor, clamp: float, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dv/du2 = exp(s)`, `dv/dt = 1`, `dv/ds = u2 exp(s)`; `d log-determinant/ds = 1`, `/dg = H W / g`."""
    wide, n, back = wide_of(u, a), u.shape[1] - u.shape[1] // 2, perm.argsort()
    gain, slope = column(g, wide), slope_of(clamp, form)
    base = gain[n:].log() - clamp
    grad_u, grad_a = empty(u.shape, u), empty(a.shape, u, a.dtype)
    grad_offset, by_u = (torch.zeros(len(g), dtype=wide) for _ in range(2))
    by_t = torch.zeros(len(g) - n, dtype=wide)
    every = (0, 2, 3)
    for u_, a_, out_, logdet_, grad_u_, grad_a_ in _parts(u, a, grad_out, grad_logdet, grad_u, grad_a):
        u1, u2 = u_.to(wide).tensor_split([n], 1)
        raw, t = a_.to(wide).tensor_split([u2.shape[1]], 1)
        w = _gather(out_.to(wide), back, empty(u_.shape, u, wide))
        grad_offset += w.sum(every)
        w1, w2 = w.tensor_split([n], 1)
        by_u[:n] += (w1 * u1).sum(every)
        by_t += (w2 * t).sum(every)
        torch.mul(w1, gain[:n], out=grad_u_[:, :n])
        torch.mul(w2, SOFT * gain[n:], out=grad_a_[:, u2.shape[1] :])
        x = torch.mul(raw, 2 * slope).sigmoid_()
        y = torch.add(base, x, alpha=2 * clamp).exp_().mul_(w2)
        grad_u_[:, n:] = y
        by_u[n:] += y.mul_(u2).sum(every)
        y.add_(logdet_.to(wide).view(-1, 1, 1, 1))
        y = torch.ops.aten.sigmoid_backward(y, x)
        torch.mul(y, 4 * clamp * slope, out=grad_a_[:, : u2.shape[1]])
    by_u[n:] = by_u[n:] / g[n:] + SOFT * by_t
    return grad_u, grad_a, by_u + by_log_gain(u, g, grad_logdet, wide), grad_offset


def by_log_gain(u: Tensor, g: Tensor, grad_logdet: Tensor, wide: torch.dtype) -> Tensor:
    return grad_logdet.to(wide).sum() * u.shape[2] * u.shape[3] / g.to(wide)


def _parts(*tensors: Tensor) -> zip:
    """Samples of each, as many at once as stay in the cache."""
    samples = max(1, PART // max(1, tensors[0][:1].numel()))
    return zip(*(x.split(samples) for x in tensors)) if tensors[0].numel() else zip()


def _gather(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """`out = x[:, index]`, see `_channels`."""
    target = out
    if channels_last(out):
        x, target = (y.permute(0, 2, 3, 1).flatten(0, 2) for y in (x, out))
    torch.index_select(x.to(out.dtype), 1, index, out=target)
    return out
