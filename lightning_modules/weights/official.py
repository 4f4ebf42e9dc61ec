"""What reading official files takes whatever the repository: the file itself, and which of our networks it fits."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError


def read(path: Path, expected: str, mmap: bool = False) -> Any:
    """The content of a file of `torch.save`; only tensors and plain containers are read, no code is run.

    Args:
        path: The file.
        expected: What it should be, in words.
        mmap: Whether tensors stay in the file until they are used.

    Raises:
        UserError: the file is absent (the message says what was `expected`), cut short, or holds other objects.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected {expected}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds objects other than tensors, or is damaged; refused ({_first(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read, probably cut short ({_first(error)})") from error


def preset(state: Mapping[str, Tensor], presets: Mapping[str, Callable[[], nn.Module]]) -> str:
    """Name of the one of `presets` whose network has the keys and shapes of `state`.

    Raises:
        UserError: none fits; the message names the first difference from the nearest.
    """
    found = {}
    for name, build in presets.items():
        with torch.device("meta"):
            found[name] = _differences(state, build().state_dict())
        if not found[name]:
            return name
    name = min(found, key=lambda n: len(found[n]))
    raise UserError(f"fits none of {', '.join(presets)}; nearest is {name}, but {found[name][0]}")


def fill(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Loads `state`, read from `path`, into `net`.

    Raises:
        UserError: the network has other keys or shapes.
    """
    if differences := _differences(state, net.state_dict()):
        raise UserError(f"{path}: does not fit this {type(net).__name__}: {differences[0]}")
    net.load_state_dict(state)


def _differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (found, expected)]
    return [
        f"{key}: found {shapes[0].get(key, 'no such entry')}, expected {shapes[1].get(key, 'no such entry')}"
        for key in {**shapes[1], **shapes[0]}
        if shapes[0].get(key) != shapes[1].get(key)
    ]


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
