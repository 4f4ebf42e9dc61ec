"""Our numbers of one tier beside those of others: Markdown, JSON, a plot."""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from penstock.benchmarks.report import table
from penstock.benchmarks.table_facts import calls_of, named
from penstock.benchmarks.table_spec import MEAN, Reference, Run, Table, Tier

Results = dict[Run, dict[str, Any]]
VERSIONS = ("python", "torch", "lightning", "penstock")


def references(spec: Table, tier: Tier) -> list[Reference]:
    """The references that have a number for a row of this tier."""
    rows = {*tier.rows, *([MEAN] if tier.mean else [])}
    return [ref for ref in spec.references if any(rows & values.keys() for values in ref.values.values())]


def values(results: Results, tier: Tier, row: str, column: str, metric: str) -> list[float]:
    """Our numbers of a cell, one a seed; none of runs that have not finished or have no such metric."""
    measured = [results[run]["metrics"] for run in tier.cell(row, column) if run in results]
    return [float(metrics[name]) for metrics in measured if (name := named(metric, metrics))]


def our_mean(results: Results, tier: Tier, column: str, metric: str) -> tuple[float, int, int] | None:
    """The mean of a column, of how many rows it is, and how many there should be."""
    rows = [row for row in tier.rows if tier.cell(row, column)]
    found = [fmean(one) for row in rows if (one := values(results, tier, row, column, metric))]
    return (fmean(found), len(found), len(rows)) if found else None


def head(tier: Tier, column: str) -> str:
    """Name of a column of ours; the tier is part of it."""
    return f"{column} (ours, {tier.name})"


def metric_rows(spec: Table, tier: Tier, results: Results, metric: str) -> list[dict[str, Any]]:
    """Lines of the table of one metric; a recalled number of others has a star, a mean says how much of it there is."""
    refs = [ref for ref in references(spec, tier) if metric in ref.values]
    lines = []
    for row in [*tier.rows, *([MEAN] if tier.mean else [])]:
        line: dict[str, Any] = {"row": row}
        for column in tier.columns:
            if row == MEAN:
                mean = our_mean(results, tier, column, metric)
                line[head(tier, column)] = _mean(*mean) if mean else ""
            else:
                found = values(results, tier, row, column, metric)
                line[head(tier, column)] = _several(found, len(tier.cell(row, column)))
        for ref in refs:
            value = ref.values[metric].get(row)
            line[ref.name] = "" if value is None else _number(value) + ("*" if ref.recalled(row) else "")
        lines.append(line)
    return lines


def earlier(spec: Table, tier: Tier, out: Path) -> dict[str, dict[str, Any]]:
    """Finished runs of the report in a folder, by the hash of their configuration; none where there is no report."""
    path = out / f"{spec.name}_{tier.name}.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    place = ("row", "column", "tier", "nfe")
    return {one["key"]: {k: v for k, v in one.items() if k not in place} for one in rows if not one["exit_code"]}


def calls(spec: Table, found: dict[str, Any]) -> dict[str, int]:
    """Network calls a sample behind each of the table's metrics that a run has and that draw samples."""
    metrics = found["metrics"]
    known = {metric: calls_of(name, metrics) for metric in spec.metrics if (name := named(metric, metrics))}
    return {metric: number for metric, number in known.items() if number is not None}


def shown(spec: Table, tier: Tier, results: Results) -> list[str]:
    """The metrics that a run of ours has, or others report of a row of this tier; all where there are none."""
    rows = {*tier.rows, *([MEAN] if tier.mean else [])}
    of_others = {m for ref in spec.references for m, values in ref.values.items() if rows & values.keys()}
    ours = {m for m in spec.metrics for found in results.values() if named(m, found["metrics"])}
    return [metric for metric in spec.metrics if metric in of_others | ours] or list(spec.metrics)


def run_rows(spec: Table, tier: Tier, results: Results) -> list[dict[str, Any]]:
    """Where each number of ours comes from."""
    return [_origin(spec, tier, run, results.get(run)) for run in tier.runs]


def write(spec: Table, tier: Tier, results: Results, out: Path, line: str) -> Path:
    """Writes `<out>/<table>_<tier>.md`, `.json` and `.png`; returns the first.

    Args:
        spec: The table.
        tier: Of which all results are.
        results: What `table_rows.finish` returned; runs that have not finished are left out.
        out: Folder, made where it is missing.
        line: The command that made it.
    """
    out.mkdir(parents=True, exist_ok=True)
    name, refs = f"{spec.name}_{tier.name}", references(spec, tier)
    done = sum(not result["exit_code"] for result in results.values())
    parts = [f"# {spec.title}: {tier.name}", f"{tier.note} {done} of {len(tier.runs)} runs finished."]
    metrics = shown(spec, tier, results)
    for metric in metrics:
        parts += [f"## {metric}", table(metric_rows(spec, tier, results, metric))]
    if any(
        "*" in cell for metric in metrics for line in metric_rows(spec, tier, results, metric) for cell in line.values()
    ):
        parts.append("\\* recalled, not read in the source")
    parts += ["## Runs", table(run_rows(spec, tier, results))]
    if refs:
        parts += ["## References", "\n".join(f"- {_source(ref)}" for ref in refs)]
    parts.append(f"`{line}`")
    path = out / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    record = {
        "title": spec.title,
        "tier": tier.name,
        "command": line,
        "metrics": spec.metrics,
        "rows": [
            {"row": run.row, "column": run.column, "tier": tier.name, **found, "nfe": calls(spec, found)}
            for run, found in results.items()
        ],
        "references": [vars(ref) for ref in refs],
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(spec, tier, results, out / f"{name}.png")
    return path


def plot(spec: Table, tier: Tier, results: Results, path: Path) -> None:
    """A panel a metric, a line a row: our numbers filled, those of others hollow; our mean only of all rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, metrics = [*tier.rows, *([MEAN] if tier.mean else [])], shown(spec, tier, results)
    wide = min(len(metrics), 5)
    high = -(-len(metrics) // wide)
    size = (4.5 * wide, 0.6 + high * (1 + 0.3 * len(rows)))
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    numbered = enumerate(references(spec, tier), start=len(tier.columns))
    marks = {ref.name: (f"C{i % 10}", "Ds^v"[i // 10 % 4]) for i, ref in numbered}
    for metric, axis in zip(metrics, axes.flat):
        for i, column in enumerate(tier.columns):
            found = {row: values(results, tier, row, column, metric) for row in tier.rows}
            mean = our_mean(results, tier, column, metric)
            if tier.mean and mean and mean[1] == mean[2]:
                found[MEAN] = [mean[0]]
            points = [(fmean(each), rows.index(row)) for row, each in found.items() if each]
            axis.plot(*(zip(*points) if points else ([], [])), "o", color=f"C{i}", label=head(tier, column), zorder=3)
            for row, each in found.items():
                axis.plot(each, [rows.index(row)] * len(each), ".", color=f"C{i}", markersize=3, zorder=4)
        for ref in references(spec, tier):
            points = [(v, rows.index(row)) for row, v in ref.values.get(metric, {}).items() if row in rows]
            colour, marker = marks[ref.name]
            style = {"linestyle": "", "color": colour, "marker": marker, "markerfacecolor": "none", "markersize": 5}
            axis.plot(*(zip(*points) if points else ([], [])), label=ref.name, **style)
        axis.set(title=metric, yticks=range(len(rows)), yticklabels=rows)
        axis.grid(axis="y", alpha=0.3)
        drawn = [float(x) for line in axis.lines for x in line.get_xdata()]
        if drawn and 0 < 20 * min(drawn) < max(drawn):
            axis.set_xscale("log")
    axes.flat[0].invert_yaxis()
    named = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(named.values(), named, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def _several(found: list[float], runs: int) -> str:
    """The mean of seeds with its deviation, and how many there are where some are missing."""
    if not found:
        return ""
    spread = f" +- {_number(stdev(found))}" if len(found) > 1 else ""
    return f"{_number(fmean(found))}{spread}" + (f" ({len(found)} of {runs})" if len(found) < runs else "")


def _mean(value: float, rows: int, all_rows: int) -> str:
    return _number(value) + (f" ({rows} of {all_rows})" if rows < all_rows else "")


def _origin(spec: Table, tier: Tier, run: Run, found: dict[str, Any] | None) -> dict[str, Any]:
    found = found or {}
    nfe = dict.fromkeys(str(number) for number in calls(spec, found).values()) if found else ()
    code, machine = found.get("exit_code"), found.get("machine") or {}
    gpu = machine.get("gpu")
    where = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores" if machine else ""
    return {
        "row": run.row,
        "column": run.column,
        "tier": tier.name,
        "status": ("failed" if code else "done") if found else "not run",
        "verb": run.verb,
        "seed": found.get("seed", run.seed),
        "global batch": found.get("global_batch", found.get("batch")),
        "ranks": found.get("ranks"),
        "length": _length(found),
        "EMA": found.get("ema") and str(found["ema"]),
        "split": found.get("split"),
        "features": found.get("features"),
        "NFE": ", ".join(nfe),
        "wall time, s": found.get("seconds") and f"{found['seconds']:.0f}",
        "machine": f"{gpu}; {where}" if gpu else where,
        "versions": ", ".join(f"{name} {machine[name]}" for name in VERSIONS if machine.get(name)),
        "commit": machine.get("commit"),
        "configuration": found.get("key"),
    }


def _length(found: dict[str, Any]) -> str:
    """How long a run trained."""
    limits = [(found.get(key), key) for key in ("epochs", "steps")]
    return ", ".join(f"{number} {key}" for number, key in limits if number and number > 0)


def _source(ref: Reference) -> str:
    known = [ref.certainty["default"], *(f"{row}: {v}" for row, v in ref.certainty.items() if row != "default")]
    return f"{ref.name}: {ref.source} ({', '.join(known)})" + (f"; {ref.note}" if ref.note else "")
