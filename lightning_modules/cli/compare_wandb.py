"""A comparison as one run of W&B: its tables, its pictures, and where the compared runs are."""

import hashlib
import re
from pathlib import Path
from typing import Any

import wandb

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.loggers import wandb_mode

Table = tuple[list[str], list[list[str]]]


def wandb_id(folder: Path) -> str | None:
    """The W&B id of the run in a run folder, or None if it had no W&B."""
    found = [re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+)", p.name) for p in sorted(folder.glob("wandb/*run-*"))]
    return next((match[1] for match in reversed(found) if match), None)


def send(
    runs: list[dict[str, Any]], tables: dict[str, Table], pictures: dict[str, Path], out: Path, options: dict[str, str]
) -> str:
    """Makes the run, of job type `compare`; the same runs compared again are the same run.

    Project and entity are those of the first compared run that went to W&B. The group is the compared runs' own where
    it is one, else `compare`. The table `runs` has the id of each, and its address where W&B is online.

    Args:
        runs: As `read_run` makes them.
        tables: Name -> (header, rows).
        pictures: Title -> PNG.
        out: Where W&B keeps its files, in `wandb/`.
        options: `project`, `entity` and `mode` where the user wrote them.

    Returns:
        Where the run is, in words.

    Raises:
        UserError: W&B does not answer, or its files can't be written.
    """
    mode = wandb_mode(options.get("mode", "auto"))
    groups = {run["folder"].resolve().parent.name for run in runs}
    names = [run["name"] for run in runs]
    ids = [wandb_id(run["folder"]) for run in runs]
    try:
        run = wandb.init(
            project=options.get("project") or _of_runs(runs, "project") or "penstock",
            entity=options.get("entity") or _of_runs(runs, "entity"),
            mode=mode,
            job_type="compare",
            group=groups.pop() if len(groups) == 1 else "compare",
            name=f"compare {', '.join(names)}"[:120],
            id="compare-" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:12],
            resume="allow" if mode == "online" else None,
            dir=str(out),
            config={"runs": names},
            settings=wandb.Settings(silent=True),
        )
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"compare logger=wandb: W&B does not answer ({error}); expected a network, or logger.wandb.mode=offline"
        ) from error
    address = run.url if mode == "online" else None
    home = address.rpartition("/")[0] if address else ""
    links = [[name, own or "", f"{home}/{own}" if home and own else ""] for name, own in zip(names, ids)]
    tables = {**tables, "runs": (["run", "id", "address"], links)}
    try:
        shown = {name: wandb.Table(columns=head, data=rows) for name, (head, rows) in tables.items()}
        shown |= {title: wandb.Image(str(path)) for title, path in pictures.items()}
        run.log({f"compare/{name}": part for name, part in shown.items()})
    except OSError as error:
        raise UserError(f"compare logger=wandb: '{out / 'wandb'}' can't be written ({error.strerror})") from error
    place = Path(run.dir).parent
    run.finish()
    if mode == "disabled":
        return "W&B: disabled"
    return f"W&B: {address}" if address else f"W&B: offline; wandb sync {place}"


def _of_runs(runs: list[dict[str, Any]], key: str) -> str | None:
    """What the first compared run with a W&B logger says."""
    return next((found for run in runs if (found := run["config"].get(f"trainer.logger.WandB.{key}"))), None)
