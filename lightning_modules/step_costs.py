"""What a training step keeps and computes, found on fake tensors: shapes and types run through it, no numbers do."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from penstock.kernels.dispatch import backend
from penstock.lightning_modules.trained_parts import blocks, networks

Batch = dict[str, Any]
GPU = torch.device("cuda", 0)  # that fake tensors say they are on: none is needed
META = torch.device("meta")
NUMBERS = (Tensor.item, Tensor.__float__)


@dataclass(frozen=True)
class StepCost:
    """Of one forward and backward pass of a batch on one rank.

    Attributes:
        saved: Bytes kept from forward to backward; weights and buffers left out, their casts by autocast included.
        inside: The most bytes that one block keeps of its own.
        flops: Operations of matrix products, convolutions and attention, a multiplication with its addition as two;
            attention as if nothing were masked.
        again: Those of the forward pass inside the blocks of its networks, which checkpointing computes twice.
        calls: Forward passes of each part that is sharded as one: with gradients, and without.
    """

    saved: int
    inside: int
    flops: int
    again: int
    calls: dict[str, tuple[int, int]]


def groups(module: nn.Module) -> dict[str, nn.Module]:
    """What `strategies.FullyShard` shards as one, by name, inner before outer; of a net, what no block in it holds."""
    names = {part: name for name, part in module.named_modules()}
    return {names[part]: part for net in networks(module) for part in (*blocks(net), net)}


def group_weights(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The weights that each of `groups` gathers."""
    seen, found = set(), {}
    for name, part in groups(module).items():
        found[name] = [p for p in dict.fromkeys(part.parameters()) if p not in seen]
        seen.update(found[name])
    return found


def faked(module: LightningModule, mode: FakeTensorMode, cast: torch.dtype | None = None) -> None:
    """Puts fake tensors on `GPU` in the place of a module's weights and buffers, which may be on the meta device.

    Args:
        module: Is changed.
        mode: That the tensors belong to.
        cast: Precision of the weights of the networks that train; None leaves theirs.
    """
    cast_ones = {p for net in networks(module) for p in net.parameters()} if cast else set()
    twins: dict[Tensor, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if tensor not in twins:
            dtype = cast if tensor in cast_ones else tensor.dtype
            twins[tensor] = torch.empty(tensor.shape, dtype=dtype, device=GPU)
            if isinstance(tensor, nn.Parameter):
                twins[tensor] = nn.Parameter(twins[tensor], requires_grad=tensor.requires_grad)
        return twins[tensor]

    with mode:
        for part in module.modules():
            for own in (part._parameters, part._buffers):
                own.update({name: twin(tensor) for name, tensor in own.items() if tensor is not None})
    module._device = GPU


def alone(module: LightningModule) -> None:
    """Has a module's training step run without a trainer: nothing is logged."""
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    steps = {"current_epoch": 0, "global_step": 0, "max_epochs": 1, "estimated_stepping_batches": 1}
    module._trainer = SimpleNamespace(log_every_n_steps=2**30, world_size=1, training=True, state=state, **steps)
    module.log = module.log_dict = lambda *_, **__: None


def step_cost(module: LightningModule, batch: Batch, backward: bool = True) -> StepCost:
    """Runs `training_step`, and its backward pass, once, and counts.

    Args:
        module: `alone`; on the meta device, on fake tensors whose mode is entered, or on real ones.
        batch: Of the same kind.
        backward: Whether the backward pass is run; there is none on fake tensors of a GPU that is not there.
    """
    saved, calls, hooks = _Saved(module), {}, []
    for name, part in groups(module).items():
        calls[name] = [0, 0]
        hooks.append(part.register_forward_pre_hook(_counting(calls[name])))
    inner = [part for net in networks(module) for part in blocks(net)]
    recomputed = _Forward(inner)
    with saved.inside_of(inner), FlopCounterMode(display=False) as counter, recomputed.counting(counter):
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            loss = module.training_step(batch, 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        while hooks:
            hooks.pop().remove()
        if backward:
            loss.backward()
    largest = max((_bytes(kept) for kept in saved.inside.values()), default=0)
    found = {name: tuple(n) for name, n in calls.items()}
    return StepCost(_bytes(saved.kept), largest, counter.get_total_flops(), recomputed.flops, found)


@contextmanager
def pretending(mode: FakeTensorMode | None = None, precision: torch.dtype | None = None) -> Iterator[None]:
    """Inside, what is made is on the meta device, or fake on `GPU`, where autocast is to `precision`, if any.

    Attention keeps what fused kernels keep, its mask left out; a number that is asked of a tensor is 1; kernels of the
    project run as their references.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", precision is not None)
    torch.set_autocast_dtype("cuda", precision or before[1])
    try:
        with backend("reference"), mode or nullcontext(), META if mode is None else GPU, _Fused():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


class _Fused(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in NUMBERS and args[0].device in (META, GPU):
            return 1.0
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.requires_grad:
        shape = (*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask.expand(shape), True, dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]


class _Saved:
    """What autograd keeps, by storage: in all, and of each block."""

    def __init__(self, module: nn.Module):
        self._own = {_storage(t) for t in (*module.parameters(), *module.buffers())}
        self.kept: dict[int, Tensor] = {}
        self.inside: dict[nn.Module, dict[int, Tensor]] = {}
        self._within: list[nn.Module] = []

    @contextmanager
    def inside_of(self, parts: list[nn.Module]) -> Iterator[None]:
        """Notes what each of the parts keeps."""
        hooks = [part.register_forward_pre_hook(lambda part, _: self._within.append(part)) for part in parts]
        hooks += [part.register_forward_hook(lambda *_: self._within.pop() and None) for part in parts]
        yield
        for hook in hooks:
            hook.remove()

    def pack(self, tensor: Tensor) -> Tensor:
        if (key := _storage(tensor)) not in self._own:
            if key not in self.kept:  # a block's own, not what came into it and is kept anyway
                for part in self._within:
                    self.inside.setdefault(part, {})[key] = tensor
            self.kept[key] = tensor
        return tensor


class _Forward:
    """Operations of forward passes with gradients inside some parts; a part inside another counts once."""

    def __init__(self, parts: list[nn.Module]):
        self._parts, self._depth, self._begun, self.flops = parts, 0, 0, 0

    @contextmanager
    def counting(self, counter: FlopCounterMode) -> Iterator[None]:
        def enter(*_: Any) -> None:
            self._depth += 1
            self._begun = counter.get_total_flops() if self._depth == 1 else self._begun

        def leave(*_: Any) -> None:
            self._depth -= 1
            if self._depth == 0 and torch.is_grad_enabled():
                self.flops += counter.get_total_flops() - self._begun

        hooks = [part.register_forward_pre_hook(enter) for part in self._parts]
        hooks += [part.register_forward_hook(leave) for part in self._parts]
        yield
        for hook in hooks:
            hook.remove()


def _counting(calls: list[int]):
    def count(*_: Any) -> None:
        calls[0 if torch.is_grad_enabled() else 1] += 1

    return count


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
