"""What makes the same network faster or smaller in memory, without touching the method."""

from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.trained_parts import blocks, networks


class Perf(Callback):
    """Prepares the network before training: all in place, so that state-dict names stay as they are.

    Args:
        compile: `net.compile()`.
        channels_last: Convolution weights in NHWC order; activations follow.
        activation_checkpointing: Recompute the blocks that the module's networks name in `checkpoint_blocks` (a tuple
            of module classes) during the backward pass, those of a denoiser beside `net` too.
    """

    def __init__(self, compile: bool = False, channels_last: bool = False, activation_checkpointing: bool = False):
        self.compile = compile
        self.channels_last = channels_last
        self.activation_checkpointing = activation_checkpointing
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._done:
            return
        net: nn.Module = pl_module.net
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        if self.activation_checkpointing:
            checkpoint_activations(pl_module)
        if self.compile:
            net.compile()
        self._done = True


def checkpoint_activations(module: nn.Module) -> None:
    """Makes every block of the networks that train recompute its activations in backward (names unchanged).

    Args:
        module: Holds the networks.

    Raises:
        UserError: the networks name no blocks, or hold none of them.
    """
    found = [block for net in networks(module) for block in blocks(net)]
    if not found:
        raise UserError(f"activation_checkpointing: {type(module).__name__} names no checkpoint_blocks to recompute")
    for block in found:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
