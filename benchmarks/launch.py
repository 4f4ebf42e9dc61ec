"""`penstock fit` as a process of its own, in a folder that is thrown away."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fitted(words: list[str], threads: int | None = None) -> Iterator[Path]:
    """Runs `penstock fit <words>` with the csv logger; yields the run folder, which is then deleted.

    Args:
        words: of the command line.
        threads: CPU threads of PyTorch; its own choice by default.

    Raises:
        RuntimeError: the run failed; its last lines are the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "RUN_DIR": folder}
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        command = [sys.executable, "-m", "penstock.lightning_modules", "fit", "logger=csv", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"penstock fit {' '.join(words)}:\n{done.stderr[-2000:]}")
        yield Path(folder)
