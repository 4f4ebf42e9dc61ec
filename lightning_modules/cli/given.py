"""Words of the verbs that are not composed: `key=value`, each key with a type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from penstock.lightning_modules.cli.compose import nest_init_args
from penstock.lightning_modules.cli.conf import options
from penstock.lightning_modules.errors import UserError, did_you_mean


def pieces(verb: str, words: list[str], keys: Mapping[str, type]) -> dict[str, str]:
    """The words by key.

    Raises:
        UserError: a word without `=`.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{verb} {word}: expected key=value{did_you_mean(word, keys)}")
        given[key] = value
    return given


def split(verb: str, words: list[str], keys: Mapping[str, type]) -> dict[str, str]:
    """The words by key; `ckpt_path` must be among them and name a file.

    Raises:
        UserError: a word without `=`, or no such checkpoint.
    """
    given = pieces(verb, words, keys)
    if "ckpt_path" not in given:
        near = next((did_you_mean(k, keys) for k in given if k not in keys), "")
        raise UserError(f"{verb}: ckpt_path=... is required{near}")
    check_file(given["ckpt_path"])
    return given


def check_file(checkpoint: str) -> None:
    """Raises UserError where `ckpt_path` is no file, with the newest checkpoint in it where it is a folder."""
    path = Path(checkpoint)
    if path.is_dir():
        found = [path / name for name in ("checkpoints/last.ckpt", "last.ckpt") if (path / name).is_file()]
        near = f" (did you mean '{found[0]}'?)" if found else ""
        raise UserError(f"ckpt_path={checkpoint}: a folder, expected a checkpoint{near}")
    if not path.is_file():
        raise UserError(f"ckpt_path={checkpoint}: no such file")


def check_keys(verb: str, given: Mapping[str, str], keys: Mapping[str, type]) -> None:
    """Raises UserError for a key that is none of `keys`."""
    for key in given:
        if key not in keys:
            raise UserError(f"{verb} {key}: unknown{did_you_mean(key, keys)}; expected one of {', '.join(keys)}")


def typed(key: str, value: str, kind: type) -> Any:
    """The value as `kind`.

    Raises:
        UserError: it is none.
    """
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{key}={value}: expected {kind.__name__}") from None


def usable_device(name: str) -> str:
    """The name of a device, once a tensor could be put there.

    Raises:
        UserError: there is no such device, or none here.
    """
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason, near = next(iter(str(error).splitlines()), "unusable"), did_you_mean(name, ["cpu", "cuda"])
        raise UserError(f"device={name}: {reason}{near}; expected cpu or an available cuda") from error
    return name


def solver_config(name: str) -> dict[str, Any]:
    """What `conf/solver/<name>.yaml` says.

    Raises:
        UserError: there is none.
    """
    known = options("solver")
    if name not in known:
        raise UserError(f"solver={name}: no such choice{did_you_mean(name, known)}; choices: {', '.join(known)}")
    return nest_init_args(yaml.safe_load(known[name].read_text()))
