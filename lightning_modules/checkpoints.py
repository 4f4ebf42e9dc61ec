"""Checkpoints that survive a kill at any moment, a full disk, a cut or hostile file, and weights of another model."""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from penstock.lightning_modules.errors import UserError, did_you_mean


class AtomicCheckpointIO(CheckpointIO):
    """Writes `<name>` so that a good file exists at every instant, and reads it without running anything inside it.

    In one folder: `.<name>.part` (being written, synced to disk before it gets its name), `<name>`, and
    `<name>.prev`, the file that `<name>` replaced. Use as `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: None = None) -> None:
        """Writes `checkpoint` to the local file `path`; whatever goes wrong, the file already there stays as it was.

        Raises:
            UserError: the file cannot be written (disk full, no permission, a remote address).
        """
        path = _local(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                _keep(path)
            os.replace(part, path)
            _sync(path.parent)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = "; the file written before it is intact" if path.exists() else ""
            raise UserError(f"checkpoint '{path}': cannot be written ({cause.strerror or cause}){kept}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """See `load_checkpoint`; loads tensors and plain values only, whatever `weights_only` says."""
        return load_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes the file, the one before it and a part left by a kill."""
        path = _local(path)
        for file in (path, previous(path), path.with_name(f".{path.name}.part")):
            file.unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Where the file that `path` replaced is kept."""
    return path.with_name(f"{path.name}.prev")


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint; where it is missing or damaged, the one it replaced, with a warning.

    Every byte is checked against the CRC stored beside it, which `torch.load` alone does not do.

    Raises:
        UserError: no such file; damaged, and so is the one before it; objects other than tensors and plain values
            (refused before any of their code runs, never replaced by an older file).
    """
    path = _local(path)
    if not path.exists() and not previous(path).exists():
        siblings = [p.name for p in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
        raise UserError(f"checkpoint '{path}': no such file{did_you_mean(path.name, siblings)}")
    try:
        return _read(path, map_location)
    except _Damaged as damage:
        try:
            checkpoint = _read(previous(path), map_location)
        except _Damaged as older:
            both = f"{damage}, and '{previous(path).name}': {older}" if previous(path).exists() else damage
            raise UserError(f"checkpoint '{path}': {both}; expected a whole checkpoint file") from None
        rank_zero_warn(f"checkpoint '{path}': {damage}; loaded '{previous(path)}', the one saved before it, instead")
        return checkpoint


def load_weights(module: nn.Module, checkpoint: Mapping[str, Any] | str | Path, name: str | None = None) -> None:
    """Loads the `state_dict` of a checkpoint (or of the file at a path) into `module`; all of it or nothing.

    Raises:
        UserError: as `check_weights`.
    """
    if not isinstance(checkpoint, Mapping):
        name, checkpoint = name or f"checkpoint '{checkpoint}'", load_checkpoint(checkpoint)
    module.load_state_dict(check_weights(module, checkpoint, name or "checkpoint"))


def check_weights(module: nn.Module, checkpoint: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The `state_dict` of a checkpoint under the names that `module` has for them.

    Prefixes that `torch.compile` puts into names are ignored on both sides. `name` is what errors call the checkpoint.

    Raises:
        UserError: no `state_dict`, or the weights of another model (missing, unexpected, other shapes).
    """
    found = checkpoint.get("state_dict")
    if not isinstance(found, Mapping):
        raise UserError(f"{name}: found the keys {sorted(map(str, checkpoint))[:8]}, expected 'state_dict' among them")
    found = {plain_name(key): value for key, value in found.items()}
    expected = {plain_name(key): (key, value) for key, value in module.state_dict().items()}
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    other = [k for k, (_, v) in expected.items() if k in found and _shape(found[k]) != _shape(v)]
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} of {len(expected)} expected keys missing (first '{missing[0]}')")
    if extra:
        complaints.append(f"{len(extra)} unexpected (first '{extra[0]}')")
    if other:
        found_shape, shape = _shape(found[other[0]]), _shape(expected[other[0]][1])
        complaints.append(f"{len(other)} of another shape (first '{other[0]}': {found_shape}, expected {shape})")
    if complaints:
        raise UserError(f"{name}: weights of another model, not of {type(module).__name__}: {'; '.join(complaints)}")
    return {key: found[plain] for plain, (key, _) in expected.items()}


def raw_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights as they were trained: those beside the average, or the only ones where nothing was averaged."""
    return checkpoint.get("current_model_state") or checkpoint.get("state_dict", {})


def fingerprint(module: nn.Module) -> str:
    """Hash of all names and weights of a module, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{plain_name(name)} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def plain_name(key: str) -> str:
    """A parameter's name without the parts that `torch.compile` adds."""
    return key.replace("_orig_mod.", "")


class _Damaged(Exception):
    """What is wrong with a file, for which the one before it may stand in."""


def _read(path: Path, map_location: Any) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError as error:
        raise _Damaged(error.strerror) from error
    if not head:
        raise _Damaged("empty")
    if head == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise _Damaged(f"cut short at {path.stat().st_size} bytes or damaged") from error
        if broken:
            raise _Damaged(f"damaged ('{broken}' does not match its checksum)")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None and head != b"PK":
            raise _Damaged("not a checkpoint") from error
        what = f"'{foreign[1]}'" if foreign else "objects of unknown type"
        expected = "expected tensors and plain values only; nothing of it was run"
        raise UserError(f"checkpoint '{path}': refused, it holds {what}, {expected}") from None
    except (RuntimeError, EOFError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise _Damaged(f"not a checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict):
        raise _Damaged(f"holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def _keep(path: Path) -> None:
    """Gives the present file its second name; by a hard link, so that the first name never points nowhere."""
    previous(path).unlink(missing_ok=True)
    try:
        os.link(path, previous(path))
    except OSError:
        os.replace(path, previous(path))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise UserError(f"checkpoint '{path}': found a remote address, expected a path on a local or mounted disk")
    return Path(path)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
