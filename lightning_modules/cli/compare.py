"""`penstock compare runs/a runs/b`: configurations, last metrics and curves side by side, offline, no torch import."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import yaml

from penstock.lightning_modules.errors import UserError, did_you_mean

WANDB_KEYS = ("logger.wandb.project", "logger.wandb.entity", "logger.wandb.mode")


def read_run(folder: Path) -> dict[str, Any]:
    """Reads one run folder: `folder`, `name`, flat `config`, last `metrics`, `curves` (metric -> [(step, value)]).

    Raises:
        UserError: no folder, or no metrics.json in it.
    """
    if not folder.is_dir():
        near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*")] if folder.parent.is_dir() else [])
        raise UserError(f"compare {folder}: no such folder{near}")
    for name in ("metrics.json", "metrics.csv"):
        if not (folder / name).is_file():
            raise UserError(f"compare {folder}: no {name} in it; expected a run folder: runs/<experiment>/<time>")
    config = folder / "config.yaml"
    curves: dict[str, list[tuple[int, float]]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key != "step" and value:
                    curves.setdefault(key, []).append((int(row["step"]), float(value)))
    return {
        "folder": folder,
        "name": f"{folder.resolve().parent.name}/{folder.resolve().name}",
        "config": _flat(yaml.safe_load(config.read_text())) if config.is_file() else {},
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "curves": curves,
    }


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = ((_entry_name(i, v), v) for i, v in enumerate(node))
    else:
        return {prefix: node}
    result: dict[str, Any] = {}
    for key, value in items:
        result |= _flat(value, f"{prefix}.{key}" if prefix and key != "init_args" else (prefix or str(key)))
    return result


def _entry_name(number: int, entry: Any) -> str:
    """A list's entry is called after its class where it has one, so that lists in another order still line up."""
    return entry["class_path"].rpartition(".")[2] if isinstance(entry, dict) and "class_path" in entry else str(number)


def table(runs: list[dict[str, Any]], part: str, only_different: bool) -> list[list[str]]:
    """Rows `[key, value of run 1, ...]` of `config` or `metrics`; keys in order of first appearance."""
    keys = dict.fromkeys(k for run in runs for k in run[part])
    rows = []
    for key in keys:
        values = [run[part].get(key, "") for run in runs]
        if only_different and all(v == values[0] for v in values):
            continue
        rows.append([key, *(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values)])
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """One panel for each metric that has a curve in some run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    keys = [k for k in dict.fromkeys(k for r in runs for k in r["curves"]) if _has_curve(runs, k)]
    columns = min(3, max(1, len(keys)))
    lines = -(-max(1, len(keys)) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.2 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for key, axis in zip(keys, axes.flat):
        for run in runs:
            if points := run["curves"].get(key):
                axis.plot(*zip(*points), label=run["name"], marker="." if len(points) < 30 else None)
        axis.set_title(key)
        axis.set_xlabel("step")
    if keys:
        axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def calls(run: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Metrics that a run has for several numbers of network calls: name -> [(calls, value)], `fd_pixels/4` and so on.

    `fd_pixels/bellman-4` belongs to a line of its own, `fd_pixels (bellman)`.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, value in run["metrics"].items():
        if match := re.fullmatch(r"(.+)/(bellman-)?(\d+)", key):
            lines.setdefault(match[1] + (" (bellman)" if match[2] else ""), []).append((int(match[3]), value))
    return {name: sorted(points) for name, points in lines.items()}


def plot_calls(runs: list[dict[str, Any]], path: Path) -> bool:
    """Quality against network calls per sample: a panel a metric, a line a run; False when no run has two points."""
    lines = [(name, run["name"], points) for run in runs for name, points in calls(run).items()]
    panels = list(dict.fromkeys(name.removesuffix(" (bellman)") for name, _, points in lines if len(points) > 1))
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    colours = {run["name"]: f"C{i}" for i, run in enumerate(runs)}
    for panel, axis in zip(panels, axes.flat):
        for name, run, points in lines:
            if name.removesuffix(" (bellman)") == panel:
                searched = name != panel
                label = f"{run}, bellman steps" if searched else run
                style = {"linestyle": "--" if searched else "-", "marker": "x" if searched else "."}
                axis.plot(*zip(*points), color=colours[run], label=label, **style)
        shown = [point for name, _, points in lines if name.removesuffix(" (bellman)") == panel for point in points]
        low, high = min(value for _, value in shown), max(value for _, value in shown)
        axis.set(title=panel, xlabel="network calls per sample", xscale="log")
        axis.set_xticks(sorted({n for n, _ in shown}), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:g}")
        if low > 0 and high > 10 * low:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _has_curve(runs: list[dict[str, Any]], key: str) -> bool:
    return key != "epoch" and any(len(run["curves"].get(key, ())) > 1 for run in runs)


def run_compare(words: list[str]) -> int:
    """Prints the tables; writes `compare.md`, `.json`, `.png` and `calls.png` into `out` (default `runs/compare`).

    With `logger=wandb` all of it becomes a run of W&B too.

    Raises:
        UserError: an unknown word, no folder, a folder that is no run, or W&B out of reach.
    """
    given = {key: value for key, equals, value in (word.partition("=") for word in words) if equals}
    folders = [Path(w) for w in words if "=" not in w and Path(w).name != "multirun.yaml"]
    keys = ("out", "logger", *WANDB_KEYS)
    for key, value in given.items():
        if key not in keys:
            near = did_you_mean(key, keys)
            raise UserError(f"compare {key}={value}: expected run folders, {', '.join(f'{k}=' for k in keys)}{near}")
    if given.get("logger", "wandb") != "wandb":
        raise UserError(f"compare logger={given['logger']}: expected wandb{did_you_mean(given['logger'], ['wandb'])}")
    if not folders:
        raise UserError("compare: expected run folders, e.g. penstock compare runs/a/... runs/b/...")
    out = Path(given.get("out", "runs/compare"))
    runs = [read_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    config_rows = table(runs, "config", only_different=len(runs) > 1)
    metric_rows = table(runs, "metrics", only_different=False)
    text = "## Configuration" + (" (what differs)" if len(runs) > 1 else "") + "\n\n"
    text += markdown(["key", *names], config_rows) + "\n\n## Metrics (last values)\n\n"
    text += markdown(["metric", *names], metric_rows) + "\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"curves": "compare.png"} | (
        {"quality and calls": "calls.png"} if plot_calls(runs, out / "calls.png") else {}
    )
    shown = "".join(f"\n![{title}]({name})\n" for title, name in pictures.items())
    (out / "compare.md").write_text(text + shown)
    kept = [{key: run[key] for key in ("name", "config", "metrics")} for run in runs]
    (out / "compare.json").write_text(json.dumps(kept, indent=1))
    plot(runs, out / "compare.png")
    print(f"written: {out}/compare.md, compare.json, {', '.join(pictures.values())}")
    if given.keys() & {"logger", *WANDB_KEYS}:
        from penstock.lightning_modules.cli.compare_wandb import send

        tables = {"configuration": (["key", *names], config_rows), "metrics": (["metric", *names], metric_rows)}
        options = {key.rpartition(".")[2]: given[key] for key in WANDB_KEYS if key in given}
        print(send(runs, tables, {title: out / name for title, name in pictures.items()}, out, options))
    return 0
