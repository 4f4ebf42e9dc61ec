"""Weights of timm's models from files of any name: safetensors or PyTorch, half precision allowed."""

import re
from pathlib import Path

from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError

NAMES = 3
SHAPES = re.compile(r"size mismatch for (\S+): .* torch\.Size\((.*)\) from .* torch\.Size\((.*)\)")


def read_weights(file: str, what: str, whose: str) -> dict[str, Tensor]:
    """The state dict in a file, in float32; errors say `what` wants it and `whose` it should be.

    Raises:
        UserError: no file, or a file that is no state dict.
    """
    from timm.models import load_state_dict

    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"{what}: no weights file {path}; put the state dict of {whose} there (safetensors or .pth)")
    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:
        raise UserError(f"{what}: {path} cannot be read as weights ({type(error).__name__}: {error})") from error
    state = state.get("module", state)  # as DeepSpeed saves
    if wrong := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        raise UserError(f"{what}: {path} holds '{wrong}', which is no tensor; expected the state dict of {whose}")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def load_weights(net: nn.Module, file: str, what: str, whose: str) -> None:
    """Loads the state dict in a file; see `read_weights`.

    Raises:
        UserError: as there, or weights of another network.
    """
    state = read_weights(file, what, whose)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{what}: {Path(file).expanduser()} does not fit {whose}: {complaint(error)}") from error


def complaint(error: RuntimeError) -> str:
    """The first thing that PyTorch found wrong with a state dict, the first of the names in it."""
    lines = str(error).splitlines()
    first = lines[min(1, len(lines) - 1)].strip()
    if shapes := SHAPES.match(first):
        name, found, expected = shapes.groups()
        more = f" and {len(lines) - 2} more" if len(lines) > 2 else ""
        return f"{name} has shape {found}, expected {expected}{more}"
    what, colon, names = first.partition(": ")
    found = names.split(", ")
    return f"{what}{colon}{', '.join(found[:NAMES])}" + (
        f" and {len(found) - NAMES} more" if len(found) > NAMES else ""
    )
