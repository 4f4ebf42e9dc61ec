"""Learning rates that fall from the last layer of pretrained models to their first, as PIIP trains them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from penstock.lightning_modules.nets.piip.vit import TransformerBranch

BLOCK = re.compile(r"blocks\.(\d+)\.")


def scaled_groups(
    named: Iterable[tuple[str, Tensor]],
    branches: Sequence[tuple[str, int]],
    rate: float = 1.0,
    outside: float = 1.0,
    decay_vectors: bool = True,
) -> list[dict[str, Any]]:
    """Groups of parameters with `lr_scale`, to be applied by `apply_scales`.

    Of a model of K layers (the deepest branch's), block j of a branch of d has the number `(j + 1) K / d`, what comes
    before the blocks 0; a scale is `rate` to the power of K + 1 less the number. What is in no branch, and behind the
    blocks of one, has the scale `outside`.

    Args:
        named: Names and parameters.
        branches: Beginnings of the names of each branch, and its number of blocks; 0 of a branch without layers to
            count, whose scale is 1, as of ConvNeXts in the authors' training.
        rate: Of each layer.
        outside: Scale of all else.
        decay_vectors: Whether biases and other vectors have weight decay.
    """
    deepest = max((depth for _, depth in branches), default=1)
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in named:
        scale = outside
        for prefix, depth in branches:
            if name.startswith(prefix):
                scale = rate ** (deepest + 1 - _number(name.removeprefix(prefix), depth, deepest))
        decays = decay_vectors or not (parameter.ndim == 1 or name.endswith(".bias"))
        groups.setdefault((scale, decays), []).append(parameter)
    return [
        {"params": found, "lr_scale": scale, **({} if decays else {"weight_decay": 0.0})}
        for (scale, decays), found in groups.items()
    ]


def _number(name: str, depth: int, deepest: int) -> float:
    """Of the layer of a parameter, by its name in its branch."""
    if not depth or name.startswith(("norm.", "head.")):
        return deepest + 1
    block = BLOCK.match(name)
    return (int(block[1]) + 1) * deepest / depth if block else 0


def apply_scales(optimizer: Optimizer) -> Optimizer:
    """Multiplies the learning rate of each group by its `lr_scale`; to be called once, before a scheduler is made."""
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_scale")
    return optimizer


def layer_optimizers(
    module: LightningModule, place: str, rate: float, outside: float = 1.0, decay_vectors: bool = True
) -> Any:
    """The module's optimiser of all that trains, in groups of learning rates, with its scheduler by steps.

    Args:
        module: Has a pyramid.
        place: Name of the pyramid in it.
        rate: See `scaled_groups`, as of all others.
        outside: Likewise.
        decay_vectors: Likewise.
    """
    branches = [
        (f"{place}.branches.{i}.", branch.depth if isinstance(branch, TransformerBranch) else 0)
        for i, branch in enumerate(module.get_submodule(place).branches)
    ]
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    optimizer = apply_scales(module.optimizer(scaled_groups(trained, branches, rate, outside, decay_vectors)))
    if module.scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": module.scheduler(optimizer), "interval": "step"}}
