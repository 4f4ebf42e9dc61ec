"""`penstock compare runs/a runs/b`: configurations, last metrics and curves side by side, offline, no torch import."""

import csv
import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from penstock.lightning_modules.cli.out import check_no_file, made, together
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.steps import CALLS

WANDB_KEYS = ("logger.wandb.project", "logger.wandb.entity", "logger.wandb.mode")
SWEEP_FILES = ("multirun.yaml", "table.md", "table.json")  # beside the jobs of a sweep
MODES = ("auto", "online", "offline", "disabled")


def read_run(folder: Path) -> dict[str, Any]:
    """Reads one run folder: `folder`, `name`, flat `config`, last `metrics`, `curves` (metric -> [(step, value)]).

    Raises:
        UserError: no folder, no metrics.json in it, or a damaged file.
    """
    if not folder.is_dir():
        near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*")] if folder.parent.is_dir() else [])
        raise UserError(f"compare {folder}: no such folder{near}")
    for name in ("metrics.json", "metrics.csv"):
        if not (folder / name).is_file():
            raise UserError(f"compare {folder}: no {name} in it; expected a run folder: runs/<experiment>/<time>")
    config = folder / "config.yaml"
    return {
        "folder": folder,
        "name": f"{folder.resolve().parent.name}/{folder.resolve().name}",
        "config": _flat(_config(config)) if config.is_file() else {},
        "metrics": _metrics(folder / "metrics.json"),
        "curves": _curves(folder / "metrics.csv"),
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"compare {path}: found bytes that are no UTF-8 ({error.reason}); expected text") from error
    except OSError as error:
        raise UserError(f"compare {path}: can't be read ({error.strerror})") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        place = f"line {mark.line + 1}, " if mark else ""
        raise UserError(f"compare {path}: {place}{problem}; expected the YAML that penstock fit wrote") from error
    if not isinstance(found, dict):
        raise UserError(f"compare {path}: found {_kind(found)}; expected key: value, as penstock fit wrote it")
    return found


def _metrics(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "an empty file" if not text.strip() else f"damaged or cut JSON ({error})"
        raise UserError(f"compare {path}: found {what}; expected name: number, as penstock fit wrote it") from error
    if not isinstance(found, dict):
        raise UserError(f"compare {path}: found {_kind(found)}; expected name: number, as penstock fit wrote it")
    for name, value in found.items():
        try:
            float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"compare {path}: {name}: found {value!r}; expected a number") from None
    return found


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    reader = csv.DictReader(StringIO(_text(path), newline=""))
    try:
        if (names := reader.fieldnames) and names[0] != "step":
            raise UserError(f"compare {path}: line 1: found '{names[0]}'; expected 'step' as the first column")
        for row in reader:
            for key, value in row.items():
                line = f"compare {path}: line {reader.line_num}"
                if key is None:
                    raise UserError(f"{line}: more values than columns")
                try:
                    if key == "step":
                        step = int(value or "")
                    elif value:
                        curves.setdefault(key, []).append((step, float(value)))
                except ValueError:
                    wanted = "whole number" if key == "step" else "number"
                    raise UserError(f"{line}, column '{key}': found '{value or ''}'; expected a {wanted}") from None
    except csv.Error as error:
        raise UserError(f"compare {path}: line {reader.line_num}: {error}") from error
    return curves


def _kind(found: Any) -> str:
    return "an empty file" if found is None else f"a {type(found).__name__}"


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

    `fd_pixels/bellman-4` belongs to a line of its own, `fd_pixels (bellman)`. Values that are not finite (text in the
    file) are left out. Where `network_calls/64` says what 64 steps took, that is the number of calls.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for key, value in run["metrics"].items():
        match = re.fullmatch(r"(.+)/(bellman-)?(\d+)", key)
        if match and match[1] != CALLS and not isinstance(value, str):
            taken = match[3] if match[2] else run["metrics"].get(f"{CALLS}/{match[3]}", match[3])
            lines.setdefault(match[1] + (" (bellman)" if match[2] else ""), []).append((int(taken), value))
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
    named = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(named.values(), named, loc="outside lower center", ncols=min(2, len(panels)), fontsize="small")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return True


def _has_curve(runs: list[dict[str, Any]], key: str) -> bool:
    return key != "epoch" and any(len(run["curves"].get(key, ())) > 1 for run in runs)


def run_compare(words: list[str]) -> int:
    """Prints the tables; writes `compare.md`, `.json`, `.png` and `calls.png` into `out` (default `runs/compare`).

    With `logger=wandb` all of it becomes a run of W&B too.

    Raises:
        UserError: an unknown word or mode, no folder, a folder that is no run, a damaged file in it, an `out` that
            can't be written, or W&B out of reach.
    """
    given = {key: value for key, equals, value in (word.partition("=") for word in words) if equals}
    folders = [Path(w) for w in words if "=" not in w and Path(w).name not in SWEEP_FILES]
    keys = ("out", "logger", *WANDB_KEYS)
    for key, value in given.items():
        if key not in keys:
            near = did_you_mean(key, keys)
            raise UserError(f"compare {key}={value}: expected run folders, {', '.join(f'{k}=' for k in keys)}{near}")
    if given.get("logger", "wandb") != "wandb":
        raise UserError(f"compare logger={given['logger']}: expected wandb{did_you_mean(given['logger'], ['wandb'])}")
    if (mode := given.get("logger.wandb.mode", "auto")) not in MODES:
        near = did_you_mean(mode, MODES)
        raise UserError(f"compare logger.wandb.mode={mode}: expected one of {', '.join(MODES)}{near}")
    if not folders:
        raise UserError("compare: expected run folders, e.g. penstock compare runs/a/... runs/b/...")
    out = Path(given.get("out", "runs/compare"))
    check_no_file("compare", out)
    runs = [read_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    config_rows = table(runs, "config", only_different=len(runs) > 1)
    metric_rows = table(runs, "metrics", only_different=False)
    text = "## Configuration" + (" (what differs)" if len(runs) > 1 else "") + "\n\n"
    text += markdown(["key", *names], config_rows) + "\n\n## Metrics (last values)\n\n"
    text += markdown(["metric", *names], metric_rows) + "\n"
    with made("compare", out), together("compare", out) as folder:
        pictures = {"curves": "compare.png"}
        pictures |= {"quality and calls": "calls.png"} if plot_calls(runs, folder / "calls.png") else {}
        shown = "".join(f"\n![{title}]({name})\n" for title, name in pictures.items())
        (folder / "compare.md").write_text(text + shown)
        kept = [{key: run[key] for key in ("name", "config", "metrics")} for run in runs]
        (folder / "compare.json").write_text(json.dumps(kept, indent=1, default=str))
        plot(runs, folder / "compare.png")
    print(text)
    print(f"written: {out}/compare.md, compare.json, {', '.join(pictures.values())}")
    if given.keys() & {"logger", *WANDB_KEYS}:
        from penstock.lightning_modules.cli.compare_wandb import send

        tables = {"configuration": (["key", *names], config_rows), "metrics": (["metric", *names], metric_rows)}
        options = {key.rpartition(".")[2]: given[key] for key in WANDB_KEYS if key in given}
        print(send(runs, tables, {title: out / name for title, name in pictures.items()}, out, options))
    return 0
