"""What branches of timm's models share: making the model, groups of its blocks, its weights."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import timm
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.timm_weights import complaint, read_weights

Net = TypeVar("Net", bound=nn.Module)


def created(model: str, kind: type[Net], **options: Any) -> Net:
    """A timm model of random weights.

    Args:
        model: timm model name, or `hf-hub:<owner>/<name>`.
        kind: Its class.
        options: Of the class.

    Raises:
        UserError: no such model, or one of another kind.
    """
    if not model.startswith("hf-hub:") and not timm.is_model(model):
        raise UserError(f"model: timm has no '{model}'{did_you_mean(model, timm.list_models())}")
    try:
        net = timm.create_model(model, **options)
    except TypeError as error:
        raise UserError(f"model: {model} is none of timm's {kind.__name__}s ({error})") from error
    if not isinstance(net, kind):
        raise UserError(f"model: {model} is a {type(net).__name__}, expected one of timm's {kind.__name__}s")
    return net


def bounds(groups: int | Sequence[int], count: int, model: str, what: str = "block") -> list[tuple[int, int]]:
    """First block of each group and the one after its last.

    Args:
        groups: Numbers of blocks in each; a number is that many groups of equal length.
        count: Number of blocks of the model.
        model: Its name.
        what: What they are called.

    Raises:
        UserError: groups that do not hold all blocks, or are empty.
    """
    if isinstance(groups, int):
        if groups < 1 or count % groups:
            raise UserError(f"groups: found {groups}, expected a divisor of the {count} {what}s of {model}, or a list")
        groups = [count // groups] * groups
    if min(groups, default=0) < 1:
        raise UserError(f"groups: found {list(groups)}, expected at least one {what} in each")
    if sum(groups) != count:
        raise UserError(f"groups: found {list(groups)} of {sum(groups)} {what}s, expected all {count} of {model}")
    return list(pairwise([0, *accumulate(groups)]))


def pretrained(model: str, weights: str) -> dict[str, Tensor]:
    """The state dict of a model, of the hub or of a file.

    Args:
        model: As `created`'s.
        weights: `hub` or a file.

    Raises:
        UserError: no file, or one that is no state dict.
    """
    if weights == "hub":
        return timm.create_model(model, pretrained=True).state_dict()
    return read_weights(weights, "weights", model)


def load_all(net: nn.Module, state: dict[str, Tensor], model: str) -> None:
    """Loads what a network has of a state dict, which must hold all of it.

    Raises:
        UserError: weights of another model.
    """
    own = net.state_dict()
    try:
        net.load_state_dict({name: value for name, value in state.items() if name in own})
    except RuntimeError as error:
        raise UserError(f"weights: do not fit {model}: {complaint(error)}") from error
