"""Runs of the real command line, in this process or as ranks of a group, and what is compared between two of them."""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ranks
import torch

from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import main

HERE = Path(__file__).parent
CLOCKS = ("throughput/", "train_seconds")
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


def state(run: Path) -> dict[str, Any]:
    """All that a run's last checkpoint holds and that must not depend on where it was stopped, flat."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    callbacks = {k: v for k, v in checkpoint["callbacks"].items() if k.startswith("EMA")}
    assert callbacks, "the run kept no average"
    kept = ("global_step", "state_dict", "current_model_state", "optimizer_states", "lr_schedulers")
    return dict(_flat({"callbacks": callbacks} | {key: checkpoint[key] for key in kept}, ""))


def _flat(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list | tuple):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _flat(value, f"{name}/{key}")
    else:
        yield name, node


def same_state(run: Path, other: Path) -> None:
    """Asserts that the last checkpoints of two runs hold the same bits."""
    found, expected = state(run), state(other)
    assert found.keys() == expected.keys()
    tensors = {key for key, value in expected.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 10
    differing = [key for key in sorted(tensors) if not torch.equal(found[key], expected[key])]
    differing += [key for key in sorted(expected.keys() - tensors) if found[key] != expected[key]]
    assert not differing, f"{len(differing)} of {len(expected)} differ, first {differing[0]}"


def metrics(run: Path) -> dict[int, dict[str, str]]:
    """`metrics.csv` by step, as text (all digits), without what depends on the clock."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    return {
        step: {k: v for k, v in row.items() if v and not k.startswith(CLOCKS)} for step, row in sorted(rows.items())
    }


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
