"""Parts of a pipeline's folder or hub repository, each read by its own library, imported where it is used."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.lightning_modules.errors import UserError


def part(path: str, name: str, library: str, kind: str, since: str = "", **options: Any) -> Any:
    """The part `name` of the folder or hub repository `path`.

    Args:
        path: Folder or hub name.
        name: Of the part, a folder in `path`.
        library: That reads it.
        kind: Class in that library.
        since: Version from which on the library has it.
        options: Of the class's `from_pretrained`.

    Raises:
        UserError: a library that is not installed or too old, a folder without that part, or one that can't be read or
            fetched.
    """
    loader = _loader(name, library, kind, since)
    return _read(path, name, lambda source: loader.from_pretrained(source, subfolder=name, **options))


def class_name(path: str, name: str) -> str:
    """The class of diffusers that the part `name` says it is of; errors as `part`."""
    loader = _loader(name, "diffusers", "AutoencoderKL", "")
    return str(_read(path, name, lambda source: loader.load_config(source, subfolder=name)).get("_class_name", ""))


def _loader(name: str, library: str, kind: str, since: str) -> Any:
    try:
        found = getattr(importlib.import_module(library), kind, None)
    except ImportError as error:
        raise UserError(
            f"'{name}' of a pipeline needs {library}, which is not installed: pip install 'penstock[text2image]'"
        ) from error
    if found is None:
        raise UserError(f"{kind} needs {library} {since} or later: pip install -U {library}")
    return found


def _read(path: str, name: str, read: Callable[[str], Any]) -> Any:
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / name).is_dir():
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
        raise UserError(f"{folder}: no '{name}' in it; found {found}, expected a diffusers folder with {name}/")
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"{path}: no such folder; expected a diffusers folder or a hub name like owner/model")
    try:
        return read(str(folder) if folder.is_dir() else path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        where = "cannot be read" if folder.is_dir() else "is no local folder and cannot be fetched from the hub"
        raise UserError(f"{path}: {name} {where} ({reason}); expected a diffusers folder with {name}/") from error
