"""A script on several gloo ranks, one process each, with the environment that torchrun gives them."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def running(
    script: str | Path,
    *arguments: str | Path,
    world: int = 2,
    timeout: float = 240,
    environment: dict[str, str] | None = None,
) -> Iterator[None]:
    """Runs `script` on `world` ranks beside the body of the `with`.

    Leaving the body waits for the ranks: an AssertionError with the end of what each wrote says that one failed, or
    took more than `timeout` seconds. None outlives the `with`.

    Args:
        script: A Python file; modules beside it and in this folder are importable in it.
        environment: Of the processes, without what makes them a group; None is this process's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = os.environ if environment is None else environment
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [base.get("PYTHONPATH")])])
    shared = {"PYTHONPATH": paths, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    with contextlib.ExitStack() as stack:
        processes, outputs = [], []
        for rank in range(world):
            group = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            outputs.append(stack.enter_context(tempfile.TemporaryFile()))
            command = [sys.executable, str(script), *map(str, arguments)]
            process = subprocess.Popen(command, env={**base, **group}, stdout=outputs[-1], stderr=subprocess.STDOUT)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield
        end = time.monotonic() + timeout
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(map(_tail, outputs))


def _tail(output) -> str:
    output.seek(0)
    return output.read()[-3000:].decode(errors="replace")
