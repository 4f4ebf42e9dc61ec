"""What the jobs of a sweep came to: `table.md` and `table.json` in its folder, a row a job and the means."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from penstock.lightning_modules.cli.compare import markdown

JOB = "sweep.json"
FILES = ("table.md", "table.json")
CLOCKS = ("epoch", "step", "train_seconds")
BEST = [f"best_on_{split}/{name}" for split in ("test", "val") for name in ("image_auroc", "pixel_auroc", "ap")]


def record(run_dir: Path, number: int, words: list[str], code: int, objective: str | None) -> None:
    """Leaves in the folder of a job what it was; the jobs of a launcher may be processes of their own."""
    run_dir.mkdir(parents=True, exist_ok=True)
    plain = [word.lstrip("+") for word in words]
    found = {"job": number, "words": plain, "exit_code": code, "objective": objective}
    (run_dir / JOB).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> list[dict[str, Any]]:
    """The jobs of a sweep by number: `job`, `words` (key -> value), `exit_code`, `objective`, `metrics`.

    A failed job has no metrics.
    """
    jobs = []
    for path in folder.glob(f"*/{JOB}"):
        job = json.loads(path.read_text(encoding="utf-8"))
        pairs = (word.partition("=") for word in job["words"])
        job["words"] = {key: value.strip("'\"") for key, _, value in pairs}
        metrics = path.parent / "metrics.json"
        done = job["exit_code"] == 0 and metrics.is_file()
        job["metrics"] = json.loads(metrics.read_text(encoding="utf-8")) if done else {}
        jobs.append(job)
    return sorted(jobs, key=lambda job: job["job"])


def swept(jobs: list[dict[str, Any]]) -> list[str]:
    """Keys whose values differ between the jobs, as they were written; all keys where none does."""
    keys = list(dict.fromkeys(key for job in jobs for key in job["words"]))
    return [key for key in keys if len({job["words"].get(key) for job in jobs}) > 1] or keys


def shown(jobs: list[dict[str, Any]]) -> list[str]:
    """The objectives, then every metric of a plain name (`image_auroc`, not `val/image_auroc` or `lr-Adam`).

    Last come those of `BEST`, a model's best epoch, that every job with metrics has.
    """
    names = dict.fromkeys(name for job in jobs for name in job["metrics"])
    plain = [name for name in names if "/" not in name and name not in CLOCKS and not name.startswith("lr-")]
    best = [name for name in BEST if name in names and all(name in job["metrics"] for job in jobs if job["metrics"])]
    return list(dict.fromkeys([*(job["objective"] for job in jobs if job["objective"] in names), *plain, *best]))


def means(jobs: list[dict[str, Any]], keys: list[str], metrics: list[str]) -> list[dict[str, Any]]:
    """Averages over the last of `keys`, for every choice of the others.

    Returns:
        `words` (of the choice), `over` (the key), `jobs`, `failed` (how many), `metrics`: name -> `value` and `jobs`,
        the number of jobs that have it; a failed job has none, and thresholds are not averaged.
    """
    *others, over = keys
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for job in jobs:
        groups.setdefault(tuple(job["words"].get(key) for key in others), []).append(job)
    averaged, rows = [name for name in metrics if not name.endswith("_threshold")], []
    for choice, group in groups.items():
        found = {name: [float(job["metrics"][name]) for job in group if name in job["metrics"]] for name in averaged}
        averages = {name: {"value": fmean(values), "jobs": len(values)} for name, values in found.items() if values}
        failed = sum(job["exit_code"] != 0 for job in group)
        words = dict(zip(others, choice))
        rows.append({"words": words, "over": over, "jobs": len(group), "failed": failed, "metrics": averages})
    return rows


def write(folder: Path, complete: bool) -> str | None:
    """Writes both files.

    Args:
        folder: Of the sweep.
        complete: Whether the sweep came to its end.

    Returns:
        The Markdown table, None where no job ran.
    """
    jobs = read(folder)
    if not jobs:
        return None
    keys, metrics = swept(jobs), shown(jobs)
    averages, rows = means(jobs, keys, metrics), []
    for job in jobs:
        words = [job["words"].get(key, "") for key in keys]
        rows.append([str(job["job"]), *words, _status(job), *_cells(job, metrics)])
    for mean in averages:
        label = f"mean of {_done(mean)}" + (f", {mean['failed']} failed" if mean["failed"] else "")
        words = [mean["words"].get(key) or "" for key in keys[:-1]]
        rows.append(["", *words, label, "", *(_mean(mean, name) for name in metrics)])
    text = markdown(["job", *keys, "status", *metrics], rows) + "\n"
    if not complete:
        text += "\nThe sweep was stopped: the jobs that were left are not in this table.\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    values = {"complete": complete, "swept": keys, "jobs": jobs, "means": averages}
    (folder / "table.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return text


def _done(mean: dict[str, Any]) -> int:
    return mean["jobs"] - mean["failed"]


def _status(job: dict[str, Any]) -> str:
    return f"failed ({job['exit_code']})" if job["exit_code"] else "done"


def _cells(job: dict[str, Any], metrics: list[str]) -> list[str]:
    return [f"{float(job['metrics'][name]):.4g}" if name in job["metrics"] else "" for name in metrics]


def _mean(mean: dict[str, Any], name: str) -> str:
    """A mean; of how many jobs, where some that did not fail lack the metric."""
    found = mean["metrics"].get(name)
    if not found:
        return ""
    return f"{found['value']:.4g}" + (f" (of {found['jobs']})" if found["jobs"] < _done(mean) else "")
