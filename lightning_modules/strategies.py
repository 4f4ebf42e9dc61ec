"""Strategies that Lightning lacks, chosen by `strategy=`."""

from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.trained_parts import blocks, networks


class FullyShard(ModelParallelStrategy):
    """FSDP2 for any module, by name: weights, gradients and optimiser states are sharded over all ranks.

    Every network that the module holds is sharded as a whole, and in it each block of the classes that it names in
    `checkpoint_blocks`, so that the weights of one block at a time are gathered (arXiv 2304.11277;
    per-parameter shards as in arXiv 2410.06511). Networks without weights to train stay whole on each rank.
    A module with a `configure_model` of its own shards itself. A checkpoint is one complete file, the same as without
    sharding: it resumes on any number of ranks, and a file cut short is replaced by the one before it.

    Args:
        gather: Precision in which weights travel and stay gathered; the shards and the optimiser keep float32.
            `bfloat16` halves memory and traffic and needs `trainer.precision=bf16-mixed`.
        free_after_forward: Free gathered weights between forward and backward: less memory, one more gathering.

    Raises:
        UserError: `gather=bfloat16` with another precision of the trainer; weights to train outside any network.
    """

    def __init__(self, gather: Literal["float32", "bfloat16"] = "float32", free_after_forward: bool = True):
        super().__init__(save_distributed_checkpoint=False)
        self.gather = gather
        self.free_after_forward = free_after_forward

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1

    def setup_environment(self) -> None:
        precision = self.precision_plugin.precision
        if self.gather == "bfloat16" and precision != "bf16-mixed":
            raise UserError(f"strategy.gather: found bfloat16 with trainer.precision={precision}, expected bf16-mixed")
        super().setup_environment()
        if not is_overridden("configure_model", self.lightning_module):
            self.lightning_module.configure_model = MethodType(self._shard, self.lightning_module)

    def _shard(self, module: LightningModule) -> None:
        if any(isinstance(part, FSDPModule) for part in module.modules()):
            return
        if loose := [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]:
            raise UserError(f"strategy FullyShard: '{loose[0]}' of {type(module).__name__} belongs to no network")
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.gather == "bfloat16":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        mesh = self.device_mesh["data_parallel"]
        for net in networks(module):
            for weight in net.parameters():  # shards have no layout, as of channels_last
                weight.data = weight.data.contiguous()
            for part in (*blocks(net), net):
                fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=self.free_after_forward)
            for name in getattr(net, "forward_methods", ()):
                register_fsdp_forward_method(net, name)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The complete state on rank 0, numbered as `optimizer.state_dict()` numbers it without shards."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not state:
            return state
        names = [name for group in state["param_groups"] for name in group["params"]]
        return _renamed(state, {name: number for number, name in enumerate(names)})

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a complete file, of this strategy or of any other, into the shards."""
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))
        options = StateDictOptions(full_state_dict=True, strict=self.lightning_module.strict_loading)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", ())):
            names = {id(weight): name for name, weight in self.model.named_parameters()}
            order = enumerate(weight for group in optimizer.param_groups for weight in group["params"])
            state = _renamed(saved, {number: names[id(weight)] for number, weight in order})
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)
        return checkpoint


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimiser's state with other names of the weights."""
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}
