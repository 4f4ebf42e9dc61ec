"""Exponential moving average of the weights, for plain, compiled and sharded modules."""

from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from penstock.lightning_modules.checkpoints import plain_name
from penstock.lightning_modules.errors import UserError


class EMA(Callback):
    """Keeps `s <- d_n s + (1 - d_n) w` after the n-th optimiser step, n = 1, 2, ...

    With warm-up `d_n = min(decay, (1 + n) / (10 + n))`, else `d_n = decay`; `s` starts from the first weights, and
    until step `start` it is the weights (`d_n = 0`). Only parameters that train are averaged; frozen ones and buffers
    are taken from the module as they are.

    The average stands in the module while it is validated or tested inside `fit`, from before any callback's
    `on_validation_epoch_start` until after every `on_validation_epoch_end`, and after `fit` ends. Whenever a checkpoint
    is written, `state_dict` is the average and `current_model_state` the raw weights, under plain names; a resumed run
    continues with the same bits.

    Lightning's `WeightAveraging` is not used: it copies the module before a strategy shards it, swaps in the epoch
    hooks (callbacks earlier in the list then see raw weights), and averages buffers. Here the average is a list of
    tensors made after sharding, each as large as this rank's shard, so one class serves one device, DDP, FSDP and
    FSDP2. It has the dtype of the weights: train with `bf16-mixed`, not `bf16-true`.

    Args:
        decay: upper bound of `d_n`, in [0, 1).
        warmup: whether `d_n` grows from 2/11 at the first step.
        start: optimiser steps after which averaging starts.

    Raises:
        UserError: decay outside [0, 1); a strategy that writes sharded folders, or a `ModelCheckpoint` that saves
            weights only: in both the average would be lost.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, start: int = 0):
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay {decay}, expected a number in [0, 1)")
        if start < 0:
            raise UserError(f"EMA: start {start}, expected 0 or more")
        self.decay = decay
        self.warmup = warmup
        self.start = start
        self.updates = 0
        self._step = 0
        self._swapped = False
        self._module: nn.Module | None = None
        self._root: nn.Module | None = None
        self._names: dict[str, int] = {}
        self._weights: list[Tensor] = []
        self._shadow: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if pl_module is not self._module:
            self._module, self.updates, self._step = pl_module, 0, 0
            self._forget()
            pl_module.register_load_state_dict_pre_hook(_accept_plain_names)
        if stage != "fit":
            return
        strategy = trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            raise UserError("EMA: strategy.save_distributed_checkpoint is true, expected false (one complete file)")
        if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type != "full":
            raise UserError(f"EMA: strategy.state_dict_type '{strategy._state_dict_type}', expected 'full'")
        if any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in trainer.checkpoint_callbacks):
            raise UserError(
                "EMA: ModelCheckpoint.save_weights_only is true and would write raw weights, expected false"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collect(trainer, pl_module)
        if self._swapped:
            self._swap()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._collect(trainer, pl_module)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step towards the present weights: a single fused call."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        decay = 0.0 if self.updates <= self.start else decay
        torch._foreach_lerp_(self._shadow, self._weights, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, average=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, average=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, average=True)

    on_test_start = on_validation_start
    on_test_end = on_validation_end

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self._step = state_dict["updates"], state_dict["step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._shadow:
            return
        self._collect(trainer, pl_module)
        if _sharded(self._root):
            shown = self._detached(checkpoint["state_dict"])
            self._swap()
            hidden = self._detached(trainer.strategy.lightning_module_state_dict())
            self._swap()
        else:
            shown = {plain_name(key): value for key, value in checkpoint["state_dict"].items()}
            hidden = {k: self._shadow[self._names[k]] if k in self._names else v for k, v in shown.items()}
        average, raw = (shown, hidden) if self._swapped else (hidden, shown)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, raw

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._forget()
        self._collect(trainer, pl_module)
        raw = checkpoint.get("current_model_state")
        if raw is None:
            rank_zero_warn("EMA: the checkpoint holds no 'current_model_state'; the average starts from its weights")
        elif _sharded(self._root):
            set_model_state_dict(self._root, raw, options=StateDictOptions(full_state_dict=True))
        else:
            pl_module.load_state_dict(raw)

    def _detached(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copies what a gathered state still shares with the weights, as it does where a mesh has one rank."""
        own = {w.untyped_storage().data_ptr() for w in self._weights}
        shared = {k for k, v in state.items() if isinstance(v, Tensor) and v.untyped_storage().data_ptr() in own}
        return {plain_name(k): v.clone() if k in shared else v for k, v in state.items()}

    def _show(self, trainer: Trainer, average: bool) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._swapped != average:
            self._collect(trainer, trainer.lightning_module)
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        hidden = [w.clone() for w in self._weights]
        torch._foreach_copy_(self._weights, self._shadow)
        self._shadow, self._swapped = hidden, not self._swapped

    def _forget(self) -> None:
        self._names, self._weights, self._shadow, self._swapped = {}, [], [], False

    @torch.no_grad()
    def _collect(self, trainer: Trainer, module: LightningModule) -> None:
        """Lists the weights that train now or did before; those that are new start their average here."""
        self._root = trainer.strategy.model
        _reshard(self._root)
        known = {name: self._shadow[place] for name, place in self._names.items()}
        places: dict[int, int] = {}
        self._names, self._weights, self._shadow = {}, [], []
        for name, weight in module.named_parameters(remove_duplicate=False):
            name = plain_name(name)
            if not weight.requires_grad and name not in known:
                continue
            if id(weight) not in places:
                places[id(weight)] = len(self._weights)
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                self._weights.append(local)
                self._shadow.append(known[name].to(local) if name in known else local.clone())
            self._names[name] = places[id(weight)]


def _sharded(module: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in module.modules()) or any(
        isinstance(p, DTensor) for p in module.parameters()
    )


def _reshard(module: nn.Module) -> None:
    """Frees the gathered weights that a forward without backward leaves behind; the next forward gathers anew."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel) and hasattr(
            getattr(part._handle, "flat_param", 0), "_local_shard"
        ):
            part._handle.reshard(free_unsharded_flat_param=part._handle.uses_sharded_strategy)


def _accept_plain_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    own = {prefix + plain_name(name): prefix + name for name, _ in named}
    for key in list(state_dict):
        state_dict[own.get(plain_name(key), key)] = state_dict.pop(key)
