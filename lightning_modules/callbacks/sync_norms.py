"""Batch norms of several ranks as one, so that training does not depend on how many share a batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from penstock.lightning_modules.callbacks.ranks import sum_over_ranks


class SyncNorms(Callback):
    """In training, batch norms take the statistics of all ranks' samples; on one rank nothing changes.

    In place, on any device, and for the running statistics too, which are then those of every rank. Without it each
    rank has its own, and a checkpoint those of the first. torch's `SyncBatchNorm` (`trainer.sync_batchnorm=true`) needs
    a GPU, loses the activation of timm's norms, and puts other modules where a network knows its own.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.world_size == 1:
            return
        for norm in pl_module.modules():
            if isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm) and "forward" not in vars(norm):
                norm.forward = partial(forward_over_ranks, norm, norm.forward)


@torch.compiler.disable
def forward_over_ranks(norm: _BatchNorm, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `norm` gives of `x` `(B, C, ...)`: in training by the statistics of all ranks, else as `own` does."""
    if not norm.training:
        return own(x)
    y, mean, var, count = _OverRanks.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            for kept, new in ((norm.running_mean, mean), (norm.running_var, var * count / (count - 1))):
                kept.copy_((1 - share) * kept + share * new)
    return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y


class _OverRanks(torch.autograd.Function):
    """Batch norm (arXiv 1502.03167, algorithm 1 and section 3) whose means are over the elements of all ranks.

    Statistics are in float32 at least. The gradient of `x` is that of the sum of the ranks' losses; those of weight and
    bias are of this rank's, and are averaged with all others.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        dims = [0, *range(2, x.ndim)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        total = sum_over_ranks(torch.cat([wide.sum(dims), wide.new_tensor([wide[:, 0].numel()])]))
        mean, count = total[:-1] / total[-1], total[-1]
        var = sum_over_ranks((wide - _along(mean, x)).square().sum(dims)) / count
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, var, count)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        dims = [0, *range(2, x.ndim)]
        dy = dy.to(mean.dtype)
        normed = (x - _along(mean, x)) * _along(scale, x)
        own = torch.stack([dy.sum(dims), (dy * normed).sum(dims)])
        by_bias, by_scale = (_along(one, x) for one in sum_over_ranks(own) / count)
        dx = (dy - by_bias - normed * by_scale) * _along(scale if weight is None else scale * weight, x)
        affine = (None, None) if weight is None else (own[1].to(weight.dtype), own[0].to(weight.dtype))
        return dx.to(x.dtype), *affine, None


def _along(values: Tensor, x: Tensor) -> Tensor:
    """`(C,)` as it spreads over `x` `(B, C, ...)`."""
    return values.view(-1, *[1] * (x.ndim - 2))
