"""Runs of the real command line, in this process or as ranks of a group, and what is compared between two of them."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ranks
import torch

from penstock.benchmarks import bits
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import main

HERE = Path(__file__).parent
state, metrics = bits.state, bits.metrics
RUN_VARIABLES = ("RUN_DIR", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")


class Done(NamedTuple):
    """How a run ended: its exit code and what it wrote on stderr."""

    code: int
    err: str


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """The given variables for a while; the ones that a run leaves behind are removed before and after."""
    saved = dict(os.environ)
    try:
        for name in RUN_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(variables)
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def penstock(verb: str, *words: str, run: Path | None = None) -> Done:
    """`penstock <verb> <words>` in this process; `run` is its folder, else the command line's own choice."""
    err = io.StringIO()
    with environment(**({"RUN_DIR": str(run)} if run else {})), contextlib.redirect_stderr(err):
        code = main([verb, *words])
    return Done(code, err.getvalue())


def command(*words: str) -> list[str]:
    """The command line as a process of its own."""
    return [sys.executable, "-m", "penstock.lightning_modules", *words]


def variables(**more: str) -> dict[str, str]:
    """The environment of such a process: one thread, the modules of this folder importable."""
    kept = {k: v for k, v in os.environ.items() if k not in RUN_VARIABLES}
    path = os.pathsep.join([str(HERE), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "WANDB_MODE": "offline", **more}


def on_ranks(world: int, jobs: list[dict[str, Any]], folder: Path, timeout: float = 900) -> list[list[Done]]:
    """Runs `jobs` (`{"words": [...], "run": folder}`) one after the other on `world` gloo ranks.

    Returns:
        How each job ended, for each rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with ranks.running(HERE / "harness.py", folder, world=world, timeout=timeout, environment=variables()):
        pass
    reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
    return [[Done(*done) for done in report] for report in reports]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The network's weights as they train, not averaged, in a run's last checkpoint."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    state = checkpoint.get("current_model_state", checkpoint["state_dict"])
    return {key: value for key, value in state.items() if key.startswith("net.")}


def same_state(run: Path, other: Path) -> None:
    """Asserts that the last checkpoints of two runs hold the same bits."""
    expected = state(other)
    assert sum(isinstance(value, torch.Tensor) for value in expected.values()) > 10
    names = bits.differing(run, other)
    assert not names, f"{len(names)} of {len(expected)} differ, first {names[0]}"


def last_checkpoint(run: Path) -> str:
    """The word that resumes `run`."""
    return f"ckpt_path={run}/checkpoints/last.ckpt"


def _rank_main(folder: Path) -> None:
    import torch.distributed as dist

    reports = []
    for job in json.loads((folder / "jobs.json").read_text()):
        reports.append(penstock("fit", *job["words"], run=job["run"]))
        if dist.is_initialized():
            dist.barrier()
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
