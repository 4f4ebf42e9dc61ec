"""What every scorer of a folder of pictures offers, and how an official one is run."""

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from penstock.lightning_modules.errors import UserError


class Scorer(ABC):
    """Scores a folder that `BenchmarkImages` wrote.

    Attributes:
        name: What the scores are called.
    """

    name: str

    @abstractmethod
    def missing(self) -> list[str]:
        """What is not on this machine ("no file ..."), each with the place where it is expected and its source."""

    @abstractmethod
    def measure(self, folder: Path) -> dict[str, float]:
        """The scores of a folder that exists; everything needed is there."""

    def score(self, folder: str | Path) -> dict[str, float]:
        """The scores of a folder.

        Raises:
            UserError: no such folder, something is missing, or the official program fails.
        """
        folder = Path(folder).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"{self.name}: no folder {folder}; expected the pictures of penstock predict")
        if missing := self.missing():
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"{self.name}: {missing[0]}{more}")
        return self.measure(folder)


class Official(Scorer):
    """A scorer that is a program of its authors, in a checkout and an environment of its own.

    Args:
        repository: Checkout of the official repository.
        weights: Folder of what it loads.
        python: Interpreter in whose environment its packages are installed; None is this one.
    """

    packages: Sequence[str]
    files: Sequence[str]
    url: str

    def __init__(self, repository: str, weights: str, python: str | None = None):
        self.repository, self.weights = (Path(p).expanduser().resolve() for p in (repository, weights))
        python = python or sys.executable
        self.python = os.path.abspath(python) if os.sep in python else python

    def missing(self) -> list[str]:
        found = [self.repository / file for file in self.files]
        absent = [f"no file {file}; expected a checkout of {self.url} there" for file in found if not file.is_file()]
        return absent + self.missing_weights() + self._missing_packages()

    @abstractmethod
    def missing_weights(self) -> list[str]:
        """The part of `missing` that lies in `weights`."""

    def run(self, *words: str, **environment: str) -> None:
        """Runs a program of the checkout.

        Raises:
            UserError: it fails; its last line is told.
        """
        command = [self.python, *words]
        done = subprocess.run(
            command, cwd=self.repository, env=os.environ | environment, capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise UserError(f"{self.name}: {words[0]} failed with exit code {done.returncode}; its last line: {said}")

    def _missing_packages(self) -> list[str]:
        look = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
        try:
            done = subprocess.run([self.python, "-c", look, *self.packages], capture_output=True, text=True)
        except OSError as error:
            return [f"no interpreter {self.python} ({error.strerror})"]
        if done.returncode:
            return [f"no working interpreter at {self.python}"]
        return [
            f"no package {name} in the environment of {self.python}; see {self.url}" for name in done.stdout.split()
        ]
