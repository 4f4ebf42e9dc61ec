"""Memory and communication of training, rank by rank, before anything is bought: from a model on the meta device."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from penstock.lightning_modules.callbacks.perf import checkpoint_activations
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.hardware import BUCKET
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.step_costs import StepCost, alone, faked, group_weights, pretending, step_cost

Strategy = Literal["ddp", "fsdp"]
SINGLE, HALF = 4, 2  # bytes of a number


class AnyText(TextEncoder):
    """Features of no text in particular, in the place of an encoder of `dim` numbers a token and `length` tokens."""

    def __init__(self, dim: int, length: int):
        self.dim, self.length = dim, length

    def __call__(self, texts, device="cpu") -> Tensor:
        return torch.zeros(len(texts), self.length, self.dim, device=device)


@dataclass(frozen=True)
class Resident:
    """Bytes that stay on a rank from step to step; `gathered` come and go with the blocks."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    gathered: int

    @property
    def all(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.gathered


@dataclass(frozen=True)
class Traffic:
    """Of a step: bytes that a rank sends as in a ring, and how many collectives they take."""

    sent: float
    collectives: int


@dataclass(frozen=True)
class Line:
    """`fixed + each n` of a batch of n samples."""

    fixed: float
    each: float

    def __call__(self, n: int) -> float:
        return self.fixed + self.each * n

    @classmethod
    def through(cls, one: float, two: float) -> "Line":
        """Of what one sample and two take."""
        return cls(2 * one - two, two - one)


@dataclass(frozen=True)
class Footprint:
    """Of a training step of n samples on one rank.

    Attributes:
        activations: Bytes kept for the backward pass.
        checkpointed: The same where blocks of the network recompute; None where it names none.
        flops: Operations.
        again: Operations that recomputing adds.
        calls: See `StepCost`.
    """

    activations: Line
    checkpointed: Line | None
    flops: Line
    again: Line
    calls: dict[str, tuple[int, int]]


def optimizers_of(module: LightningModule) -> list[Optimizer]:
    """What `configure_optimizers` makes, in any of Lightning's forms."""
    made = module.configure_optimizers()
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], list):
        made = made[0]
    made = made if isinstance(made, list | tuple) else [made]
    return [one["optimizer"] if isinstance(one, dict) else one for one in made]


def states_of(module: LightningModule) -> list[tuple[Tensor, Tensor]]:
    """The optimisers' states after a step, each with its weight, of a module on the meta device.

    Gradients are set and the optimisers step once, without numbers.
    """
    found = []
    for optimizer in optimizers_of(module):
        for group in optimizer.param_groups:
            if group.get("fused"):  # holds the same, and refuses the meta device
                group["fused"] = False
            for weight in group["params"]:
                weight.grad = torch.empty_like(weight)
        optimizer.step()
        for weight, state in optimizer.state.items():
            found += [(weight, value) for value in state.values() if isinstance(value, Tensor)]
    module.zero_grad(set_to_none=True)
    return found


def shard(weight: Tensor, ranks: int) -> int:
    """Numbers of a weight on the rank that has most: rows are dealt out, the last ranks may have fewer."""
    rows = weight.shape[0] if weight.ndim else 1
    return -(-rows // ranks) * (weight.numel() // max(rows, 1))


def resident(
    module: LightningModule,
    states: list[tuple[Tensor, Tensor]],
    strategy: Strategy,
    ranks: int,
    gather: int = SINGLE,
    ema: bool = False,
) -> Resident:
    """What stays on the rank that has most.

    Sharded, the weights of two blocks are gathered at once, the one that runs and the next one, and the gradients of
    one are whole before they are reduced, in `gather` bytes a number and in float32. States of a weight's shape are
    cut as it is, others are whole.

    Args:
        module: On the meta device.
        states: Of its optimisers, see `states_of`.
        strategy: `fsdp` shards as `strategies.FullyShard` does.
        ranks: How many.
        gather: Bytes of a gathered number.
        ema: Whether the weights are averaged.
    """
    shared = group_weights(module) if strategy == "fsdp" else {}
    inside = {p for weights in shared.values() for p in weights}

    def local(weight: Tensor) -> int:
        return shard(weight, ranks) if weight in inside else weight.numel()

    def held(tensors: Iterable[Tensor]) -> int:
        return sum(local(tensor) * tensor.element_size() for tensor in tensors)

    training, gathered = [p for p in module.parameters() if p.requires_grad], 0
    if shared:
        sizes = sorted(sum(p.numel() for p in weights) for weights in shared.values())
        gathered = gather * sum(sizes[-2:]) + (gather + SINGLE) * sizes[-1]
    whole = held(module.parameters()) + sum(b.numel() * b.element_size() for b in module.buffers())
    kept = sum((local(w) if v.shape == w.shape else v.numel()) * v.element_size() for w, v in states)
    return Resident(whole, held(training), kept, held(training) if ema else 0, gathered)


def traffic(
    module: nn.Module,
    strategy: Strategy,
    ranks: int,
    calls: dict[str, tuple[int, int]],
    gather: int = SINGLE,
    free_after_forward: bool = True,
) -> Traffic:
    """What a step sends: DDP reduces all gradients; sharded, each pass gathers weights and reduces gradients.

    Args:
        module: On any device.
        strategy: See `resident`.
        ranks: How many.
        calls: Of each part that is sharded as one, see `StepCost`.
        gather: Bytes of a gathered number; gradients are reduced in float32.
        free_after_forward: Whether a backward pass gathers once more.
    """
    ring = (ranks - 1) / ranks
    if strategy == "ddp":
        size = SINGLE * sum(p.numel() for p in module.parameters() if p.requires_grad)
        return Traffic(2 * ring * size, math.ceil(size / BUCKET))
    sent, collectives = 0.0, 0
    for name, weights in group_weights(module).items():
        if not weights:
            continue
        size = ranks * sum(shard(p, ranks) for p in weights)
        trained = ranks * sum(shard(p, ranks) for p in weights if p.requires_grad)
        with_gradient, without = calls[name]
        gathers = (1 + free_after_forward) * with_gradient + without
        reductions = with_gradient if trained else 0
        sent += ring * (gathers * gather * size + reductions * SINGLE * trained)
        collectives += gathers + reductions
    return Traffic(sent, collectives)


def footprint(
    make: Callable[[], LightningModule],
    batch: Callable[[LightningModule, int], dict[str, Any]],
    precision: torch.dtype | None,
    gather: torch.dtype | None = None,
) -> Footprint:
    """Runs the training step without numbers, on one sample and on two, as it is and with checkpointing.

    Args:
        make: Builds the module on the meta device.
        batch: The batch of n samples that a module is given, called where new tensors are of the right kind.
        precision: Of autocast; None is none.
        gather: Precision of gathered weights, where it is not their own.

    Raises:
        UserError: the step asks for numbers, or for what the batch lacks.
    """
    exact = [_cost(make, batch, n) for n in (1, 2)]
    plain = exact if precision is None else [_cost(make, batch, n, precision, gather) for n in (1, 2)]
    checkpointed = None
    if exact[0].again:
        less = [_cost(make, batch, n, precision, gather, True) for n in (1, 2)]
        checkpointed = Line.through(*(kept.saved + whole.inside for kept, whole in zip(less, plain)))
    return Footprint(
        Line.through(*(cost.saved for cost in plain)),
        checkpointed,
        Line.through(*(cost.flops for cost in exact)),
        Line.through(*(cost.again for cost in exact)),
        exact[0].calls,
    )


def _cost(
    make: Callable[[], LightningModule],
    batch: Callable[[LightningModule, int], dict[str, Any]],
    n: int,
    precision: torch.dtype | None = None,
    gather: torch.dtype | None = None,
    checkpointing: bool = False,
) -> StepCost:
    module, mode = make(), None
    alone(module)
    if precision is not None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        faked(module, mode, gather)
    if checkpointing:
        checkpoint_activations(module)
    try:
        with pretending(mode, precision):
            return step_cost(module, batch(module, n), backward=mode is None and not checkpointing)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"plan: {type(module).__name__} wants batches with {error}, which is not made up") from error
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"plan: a step of {type(module).__name__} can't run without numbers ({why})") from error
