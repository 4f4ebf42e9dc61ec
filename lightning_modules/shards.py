"""Folders of shards beside a manifest, as `penstock pairs` and `penstock encode` leave them: reading and writing."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from penstock.lightning_modules.errors import UserError


def shard_file(folder: Path, number: int) -> Path:
    """File of one shard; what else belongs to it has the same name with another ending."""
    return folder / f"shard_{number:06d}.safetensors"


def load_manifest(path: Path, what: str, verb: str, version: int) -> dict[str, Any]:
    """The JSON object of a manifest.

    Args:
        path: Of the file.
        what: Is in the folder, in errors.
        verb: Of the command line that makes such folders.
        version: That is understood.

    Raises:
        UserError: there is none, or it is no object of this version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        found = f"no {path.name} there; expected a folder made by penstock {verb}"
        raise UserError(f"{what} '{path.parent}': {found}") from None
    except ValueError as error:
        raise UserError(f"{what} '{path}': not JSON ({error}); expected a file made by penstock {verb}") from None
    if not isinstance(manifest, dict):
        found = type(manifest).__name__
        raise UserError(f"{what} '{path}': found a {found}, expected an object made by penstock {verb}")
    if manifest.get("version") != version:
        raise UserError(f"{what} '{path}': found version {manifest.get('version')}, expected {version}")
    return manifest


def write_complete(path: Path, part: Path, content: bytes, what: str) -> None:
    """Gives a file its name when it is complete and on disk.

    Args:
        path: Of the file.
        part: Its name until then, in the same folder.
        content: Of the file.
        what: It is of, in errors.

    Raises:
        UserError: the disk is full, or the folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"{what} '{path}': cannot be written ({error.strerror}); what is complete stays") from error
