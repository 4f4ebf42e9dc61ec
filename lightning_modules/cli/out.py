"""The folder that `sample` and `compare` write into: tried before the work, its files whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from penstock.lightning_modules.errors import UserError


def check_no_file(verb: str, out: Path) -> None:
    """Raises UserError where `out` is a file."""
    if out.is_file():
        near = f" (did you mean 'out={out.parent}'?)" if out.parent != Path(".") else ""
        raise UserError(f"{verb} out={out}: a file; expected a folder, new or old{near}")


@contextmanager
def made(verb: str, out: Path) -> Iterator[None]:
    """Makes the folder and tries a file in it; where the body fails, folders that this made go, unless in use.

    Raises:
        UserError: it can't be made or written.
    """
    check_no_file(verb, out)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        except OSError as error:
            raise _refused(verb, out, error) from error
        yield
    except BaseException:
        with suppress(OSError):
            for folder in new:
                if folder.exists():
                    folder.rmdir()
        raise


@contextmanager
def together(verb: str, out: Path) -> Iterator[Path]:
    """A hidden folder in `out` to write files into; they move to `out` when all are complete, or none does.

    Raises:
        UserError: the disk is full, or a name is a folder already.
    """
    part = None
    try:
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=out))
        yield part
        files = sorted(part.iterdir())
        if taken := next((out / file.name for file in files if (out / file.name).is_dir()), None):
            raise UserError(f"{verb} out={out}: '{taken.name}' in it is a folder; expected a file, or none")
        for file in files:
            os.replace(file, out / file.name)
    except OSError as error:
        raise _refused(verb, out, error) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _refused(verb: str, out: Path, error: OSError) -> UserError:
    return UserError(
        f"{verb} out={out}: can't be written ({error.strerror or error}); expected a folder that can, with room in it"
    )
