"""One process trains in a run folder at a time: a POSIX lock, which ends with its process however that ends."""

import errno
import fcntl
from pathlib import Path
from typing import IO

from penstock.lightning_modules.errors import UserError

_claims: list[IO[str]] = []


def claim(folder: Path) -> None:
    """Makes this process the only one to train in `folder`, an existing one, until `release`.

    File systems without locks are left to the user's care.

    Raises:
        UserError: another process trains there.
    """
    file = (folder / ".lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"run folder '{folder}': another process trains in it; expected it to be finished or stopped first"
            ) from None
        return
    _claims.append(file)


def release() -> None:
    """Gives back what this process claimed."""
    while _claims:
        _claims.pop().close()


def claimed(folder: Path) -> bool:
    """Whether another process trains in `folder`."""
    return _try(folder, fcntl.LOCK_NB)


def wait_until_free(folder: Path) -> None:
    """Returns when no other process trains in `folder`."""
    _try(folder, 0)


def _try(folder: Path, flags: int) -> bool:
    path = folder / ".lock"
    if not path.exists():
        return False
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | flags)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False
