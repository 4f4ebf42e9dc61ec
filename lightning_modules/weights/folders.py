"""Parts of a pipeline's folder or hub repository, or a model alone in one, read by its library where it is used."""

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from penstock.lightning_modules.errors import UserError


def part(path: str, name: str, library: str, kind: str, since: str = "", **options: Any) -> Any:
    """The part `name` of the folder or hub repository `path`.

    Args:
        path: Folder or hub name.
        name: Of the part, a folder in `path`; empty where `path` is that part.
        library: That reads it.
        kind: Class in that library.
        since: Version from which on the library has it.
        options: Of the class's `from_pretrained`.

    Raises:
        UserError: a library that is not installed or too old, a folder without that part, or one that can't be read or
            fetched.
    """
    loader = _loader(name, library, kind, since)
    options |= {"subfolder": name} if name else {}
    return _read(path, name, lambda source: loader.from_pretrained(source, **options))


def class_name(path: str, name: str) -> str:
    """The class of diffusers that the part `name` says it is of; errors as `part`."""
    loader = _loader(name, "diffusers", "AutoencoderKL", "")
    options = {"subfolder": name} if name else {}
    return str(_read(path, name, lambda source: loader.load_config(source, **options)).get("_class_name", ""))


def autoencoder(path: str) -> tuple[str, str]:
    """Where the autoencoder of `path` lies, `vae` or the empty string, and its class.

    A pipeline's part `vae` comes first. Only where there is none may `path` be an autoencoder alone, as those of
    stabilityai/sd-vae-ft-ema.

    Raises:
        UserError: as `part`, for `vae`.
    """
    alone = Path(path).expanduser()
    if alone.is_dir():
        name = "" if (alone / "config.json").is_file() and not (alone / "vae").is_dir() else "vae"
        return name, class_name(path, name)
    try:
        return "vae", class_name(path, "vae")
    except UserError:
        with suppress(UserError):
            return "", class_name(path, "")
        raise


def _loader(name: str, library: str, kind: str, since: str) -> Any:
    try:
        found = getattr(importlib.import_module(library), kind, None)
    except ImportError as error:
        what = f"'{name}' of a pipeline" if name else kind
        raise UserError(
            f"{what} needs {library}, which is not installed: pip install 'penstock[text2image]'"
        ) from error
    if found is None:
        raise UserError(f"{kind} needs {library} {since} or later: pip install -U {library}")
    return found


def _read(path: str, name: str, read: Callable[[str], Any]) -> Any:
    folder = Path(path).expanduser()
    kind = f"a diffusers folder with {name}/" if name else "a folder with config.json and weights"
    if folder.is_dir() and not (folder / (name or "config.json")).exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir() or not name)) or "no folders"
        raise UserError(f"{folder}: no '{name or 'config.json'}' in it; found {found}, expected {kind}")
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"{path}: no such folder; expected {kind.partition(' with')[0]} or a hub name like owner/model")
    try:
        return read(str(folder) if folder.is_dir() else path)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        where = "cannot be read" if folder.is_dir() else "is no local folder and cannot be fetched from the hub"
        raise UserError(f"{path}: {name or 'model'} {where} ({reason}); expected {kind}") from error
