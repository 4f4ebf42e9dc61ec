"""Data encoded once: a folder of latents with their captions, sharded and resumable.

A folder of latents holds

    latents.json                  what made them: fingerprint of the data, autoencoder, type; how rows lie in shards
    shard_000000.safetensors      `mean` and `std` `(k, *shape)` of each code, `index` `(k,)` in the data set, `split`
                                  `(k,)` (0 train, 1 val, 2 test), `label` `(k,)` where there are classes
    shard_000000.json             `text`: captions of each row, all wordings; sums of the channels over training rows

Codes are the flow's data: shifted and scaled as the autoencoder's configuration says. `std` is the deviation of the
encoder's distribution in the same units, so that its noise can be drawn anew each time; an encoder without one, or
`posterior=mean`, has none. Rows of a shard have one shape; rows of several aspects lie in shards of their own. A file
gets its name when it is complete and on disk, so a killed run goes on with the shards that are missing, on any number
of ranks.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.shards import load_manifest, shard_file, write_complete

MANIFEST = "latents.json"
VERSION = 1
SPLITS = ("train", "val", "test")
ENTRIES = {"key": str, "shards": list, "shapes": list, "autoencoder": dict, "data": str, "class_names": list}


def missing(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """Numbers of the shards that are not there."""
    return [number for number in range(len(manifest["shards"])) if not shard_file(folder, number).exists()]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of latents.

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = folder / MANIFEST
    manifest = load_manifest(path, "latents", "encode", VERSION)
    for key, kind in ENTRIES.items():
        if not isinstance(manifest.get(key), kind):
            raise UserError(f"latents '{path}': '{key}' is {manifest.get(key)!r}, expected a {kind.__name__}")
    return manifest


def read_side(folder: Path, number: int) -> dict[str, Any]:
    """Captions and sums of a shard.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = shard_file(folder, number).with_suffix(".json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def read_rows(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Whole tensors of a shard, by name; those that it lacks are left out.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def read_some(path: Path, rows: np.ndarray) -> dict[str, Tensor]:
    """`mean` and, where there is one, `std` of the rows `(b,)` of a shard.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in ("mean", "std") if name in file.keys()}  # noqa: SIM118
            return {name: torch.cat([part[row : row + 1] for row in rows.tolist()]) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"latents '{path}': cannot be read ({type(error).__name__}); delete the shard's two files, and penstock encode "
        "makes them anew"
    )


def check_complete(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError where shards are missing."""
    if left := missing(folder, manifest):
        raise UserError(
            f"latents '{folder}': {len(left)} of {len(manifest['shards'])} shards are missing (first "
            f"{shard_file(folder, left[0]).name}); finish them with penstock encode"
        )


def channel_sums(mean: Tensor, std: Tensor | None, chosen: Tensor) -> dict[str, Any]:
    """Number of values, sums and sums of squares of each channel, over the `chosen` `(k,)` of `(k, [T,] C, H, W)`."""
    x = mean[chosen].double().movedim(-3, 0).flatten(1)
    spread = 0.0 if std is None else std[chosen].double().square().movedim(-3, 0).flatten(1).sum(1)
    second = x.square().sum(1) + spread
    return {"count": x.shape[1], "first": x.sum(1).tolist(), "second": second.tolist()}


def statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation `(C,)` of the channels over the training rows, the encoder's noise among it.

    Raises:
        UserError: a folder that is none of latents or not complete, or a channel that is constant.
    """
    manifest = read_manifest(folder)
    check_complete(folder, manifest)
    sums = [read_side(folder, number)["sums"] for number in range(len(manifest["shards"]))]
    count = sum(part["count"] for part in sums)
    first, second = (np.sum([part[key] for part in sums], 0) / count for key in ("first", "second"))
    variance = torch.from_numpy(second - first**2)
    if flat := (variance <= 1e-12).nonzero().flatten().tolist():
        raise UserError(
            f"latents '{folder}': channel {flat[0]} is constant, expected channels that can be standardised"
        )
    return torch.from_numpy(first).float(), variance.sqrt().float()


def check_space(folder: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuses latents of another space than that of an autoencoder: channels, factors, scale, class or weights.

    Raises:
        UserError: what was found and what is expected.
    """
    found = manifest["autoencoder"]
    for key, expected in identity.items():
        own = found.get(key)
        if key == "posterior" or own == expected:
            continue
        if isinstance(own, list) and isinstance(expected, list) and len(own) == len(expected):
            place = next(n for n, (a, b) in enumerate(zip(own, expected)) if a != b)
            key, own, expected = f"{key} of channel {place}", own[place], expected[place]
        was = "other weights" if key == "weights" else f"{key} {own}"
        wanted = "those" if key == "weights" else f"{expected}, that"
        raise UserError(
            f"latents '{folder}': made with {was}, expected {wanted} of model.autoencoder; give the autoencoder that "
            "made them, or encode the data anew with penstock encode"
        )


def written(path: Path, content: bytes) -> None:
    """Gives a file of latents its name when it is complete and on disk; see `shards.write_complete`."""
    write_complete(path, path.with_name(f".{path.name}.{os.getpid()}.part"), content, "latents")
