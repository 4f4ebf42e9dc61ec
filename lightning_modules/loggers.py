"""Loggers that write into the run folder (`RUN_DIR`): metrics.csv and metrics.json, W&B, TensorBoard."""

import csv
import json
import math
import os
import time
from argparse import Namespace
from io import StringIO
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


def run_dir() -> Path:
    """The folder of this run: `RUN_DIR`, set by the command line, else the working folder."""
    return Path(os.environ.get("RUN_DIR", "."))


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file so that a reader sees the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8", newline="")
    os.replace(beside, path)


class RunLogger(Logger):
    """`metrics.csv` (one row a step) and `metrics.json` (last value of every metric, flat name -> number).

    A resumed run goes on in the same files; rows after the checkpoint that it resumed from are dropped first. Both
    files are written whole, hence not at every row: every few seconds, before a checkpoint, and at the end.

    Args:
        save_dir: Folder of the two files; None is the run folder.
        seconds: Shortest time between two writes.
    """

    def __init__(self, save_dir: str | None = None, seconds: float = 5.0):
        super().__init__()
        self.seconds = seconds
        self._written = -math.inf
        self._folder = Path(save_dir) if save_dir else run_dir()
        self._rows: dict[int, dict[str, float]] = {}
        self._fresh = False
        self._opened = False

    @property
    def name(self) -> str:
        return "run"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        return str(self._folder)

    @property
    def experiment(self) -> "RunLogger":
        return self

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters stand in config.yaml already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds `metrics` to the row of `step`."""
        if not self._opened:
            self.rewind((step or 0) - 1)
        step = self.last_row if step is None else int(step)
        self._rows.setdefault(max(step, 0), {}).update({k: float(v) for k, v in metrics.items()})
        self._fresh = True

    @property
    def last_row(self) -> int:
        """Step of the last row; -1 when there is none."""
        return max(self._rows, default=-1)

    @rank_zero_only
    def rewind(self, last: int) -> None:
        """Goes on after the row of step `last` of the file in the folder, if there is one; later rows are dropped."""
        path, self._rows, self._opened = self._folder / "metrics.csv", {}, True
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row["step"] and int(row["step"]) <= last:
                        self._rows[int(row["step"])] = {k: float(v) for k, v in row.items() if v and k != "step"}

    @rank_zero_only
    def save(self) -> None:
        """Writes both files, if the last time was long ago: the trainer calls this after every row."""
        if time.monotonic() - self._written >= self.seconds:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Writes both files now."""
        if not self._fresh:
            return
        keys = list(dict.fromkeys(k for row in self._rows.values() for k in row))
        lines = [["step", *keys]]
        last: dict[str, float] = {}
        for step in sorted(self._rows):
            row = self._rows[step]
            last.update(row)
            lines.append([step, *(repr(row[k]) if k in row else "" for k in keys)])
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        write_atomically(self._folder / "metrics.csv", text.getvalue())
        finite = {k: v if math.isfinite(v) else str(v) for k, v in last.items()}
        write_atomically(self._folder / "metrics.json", json.dumps(finite, indent=1) + "\n")
        self._fresh, self._written = False, time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()


def logged_in_to_wandb() -> bool:
    """True when there is a W&B key: `WANDB_API_KEY`, or the netrc entry that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return file.is_file() and netrc(file).authenticators(host) is not None
    except NetrcParseError:
        return False


def wandb_mode(mode: str = "auto") -> str:
    """`online`, `offline` or `disabled`: `WANDB_MODE` where it is set, else `mode`, where `auto` looks for a key."""
    if mode == "auto":
        mode = "online" if logged_in_to_wandb() else "offline"
    return os.environ.get("WANDB_MODE") or mode


class WandB(WandbLogger):
    """Weights & Biases in the run folder: online when logged in, else offline (`wandb sync` sends it later).

    The whole configuration becomes the run's config, last values its summary; a resumed run keeps its id.

    Args:
        project: W&B project.
        mode: `auto` = online when a key is found, else offline; `WANDB_MODE` in the environment wins.
        entity: W&B user or team.
        group: Groups runs in the web page.
        tags: Tags of the run.
        log_model: Upload checkpoints as artifacts: at the end (true) or each one (`all`).
    """

    def __init__(
        self,
        project: str = "penstock",
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        log_model: Literal["all"] | bool = False,
    ):
        folder = run_dir().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        mode = wandb_mode(mode)
        name = f"{folder.parent.name}-{folder.name}"
        super().__init__(
            name=name,
            id=name.replace("/", "-")[-120:],
            save_dir=str(folder),
            project=project,
            mode=mode,
            entity=entity,
            group=group or folder.parent.name,
            tags=tags,
            log_model=log_model if mode == "online" else False,
            resume="allow" if mode == "online" else None,
        )

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        """Sends the complete configuration."""
        self.experiment.config.update(config, allow_val_change=True)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        table = [[k, v] for k, v in dict(self.experiment.summary).items() if isinstance(v, int | float)]
        if status == "success" and table:
            self.log_table("summary", columns=["metric", "value"], data=table)


class TensorBoard(TensorBoardLogger):
    """TensorBoard event files in the run folder."""

    def __init__(self) -> None:
        super().__init__(save_dir=str(run_dir()), name="tensorboard", version="")
