"""A small flow whose training is planned and measured, in one process and, run as a script, on two gloo ranks."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from penstock.lightning_modules.nets.starflow import STARFlow as Net
from penstock.lightning_modules.starflow import STARFlow
from penstock.lightning_modules.step_costs import alone
from penstock.lightning_modules.strategies import FullyShard

SHAPE = (3, 8, 8)


def flow() -> STARFlow:
    """Three layers of width 96 in two blocks, on the device of the context, in training mode."""
    net = Net(shape=SHAPE, dim=96, depths=[1, 2], head_dim=32)
    module = STARFlow(net, optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-3))
    alone(module)
    return module.train()


def batch(module, n: int) -> dict:
    """Of n samples."""
    return {"index": torch.arange(n), "image": torch.zeros(n, *SHAPE)}


def local(tensor: torch.Tensor) -> int:
    """Bytes that this rank has."""
    return getattr(tensor, "_local_tensor", tensor).nbytes


def main(folder: Path) -> None:
    """One step in shards; writes what each rank holds and sends."""
    dist.init_process_group("gloo")
    ring, sent, calls = (dist.get_world_size() - 1) / dist.get_world_size(), [], []

    def counted(name: str) -> None:
        original = getattr(dist, name)

        def call(*args, **kwargs):
            tensors = [kwargs.get(key) for key in ("output_tensor", "input_tensor", "output", "input")]
            tensors = [t for t in (*args, *tensors) if isinstance(t, torch.Tensor)]
            sent.append(ring * max(t.nbytes for t in tensors))
            calls.append(name)
            return original(*args, **kwargs)

        setattr(dist, name, call)

    for name in ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single"):
        if hasattr(dist, name):  # versions of torch call the one or the other
            counted(name)
    module, strategy = flow(), FullyShard()
    strategy._device_mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    strategy._shard(module)
    (optimizer,) = [module.configure_optimizers()]
    module.training_step(batch(module, 2), 0).backward()
    found = {"gradients": sum(local(p.grad) for p in module.parameters()), "sent": sum(sent), "calls": len(calls)}
    optimizer.step()
    found["weights"] = sum(map(local, (*module.parameters(), *module.buffers())))
    found["optimizer"] = sum(local(v) for state in optimizer.state.values() for v in state.values())
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
