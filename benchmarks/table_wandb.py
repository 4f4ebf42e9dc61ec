"""A report as one run of W&B, of job type `table`: the numbers, where each comes from, the plot."""

import sys
from pathlib import Path
from typing import Any

from penstock.benchmarks.table_facts import named
from penstock.benchmarks.table_report import Results, references, run_rows
from penstock.benchmarks.table_spec import Table, Tier
from penstock.lightning_modules.loggers import wandb_mode

WAIT = 30  # seconds for W&B to answer


def numbers(spec: Table, tier: Tier, results: Results) -> tuple[list[str], list[list[Any]]]:
    """Head and lines of one table: a line a finished run, with its metrics and where they come from."""
    shown = run_rows(spec, tier, results)
    origin = [key for key in shown[0] if key not in ("row", "column", "status")]
    head = ["row", "column", *spec.metrics, *origin]
    lines = []
    for run, line in zip(tier.runs, shown):
        if (found := results.get(run)) and not found["exit_code"]:
            metrics = [_number(found["metrics"], metric) for metric in spec.metrics]
            lines.append([run.row, run.column, *metrics, *(_text(line[key]) for key in origin)])
    return head, lines


def send(spec: Table, tier: Tier, results: Results, report: Path, out: Path, options: dict[str, str]) -> str:
    """Makes the run; the same table and tier made again are the same run. Where W&B does not answer, nothing is lost.

    Args:
        spec: The table.
        tier: Of which the results are.
        results: Of the runs.
        report: The Markdown file, beside which the plot lies.
        out: Where W&B keeps its files, in `wandb/`.
        options: `project`, `entity` and `mode` where the user wrote them.

    Returns:
        Where the run is, in words.
    """
    mode = wandb_mode(options.get("mode", "auto"))
    if mode == "disabled":
        return "W&B: disabled"
    try:
        return _send(spec, tier, results, report, out, options, mode)
    except Exception as error:  # whatever W&B raises: the report lies in its files already
        print(f"W&B: {type(error).__name__}: {' '.join(str(error).split())}"[:300], file=sys.stderr)
        return f"W&B: not logged; the report is {report}"


def _send(
    spec: Table, tier: Tier, results: Results, report: Path, out: Path, options: dict[str, str], mode: str
) -> str:
    import wandb

    head, lines = numbers(spec, tier, results)
    out.mkdir(parents=True, exist_ok=True)
    name = f"{spec.name}_{tier.name}"
    run = wandb.init(
        project=options.get("project", "penstock"),
        entity=options.get("entity"),
        mode=mode,
        job_type="table",
        group=spec.name,
        tags=[tier.name],
        name=name,
        id=f"table-{name}",
        resume="allow" if mode == "online" else None,
        dir=str(out),
        config={"table": spec.name, "tier": tier.name, "title": spec.title},
        settings=wandb.Settings(silent=True, init_timeout=WAIT),
    )
    of_others = [
        [ref.name, metric, row, value, ref.source, "recalled" if ref.recalled(row) else "confirmed"]
        for ref in references(spec, tier)
        for metric, values in ref.values.items()
        for row, value in values.items()
    ]
    logged: dict[str, Any] = {
        "table/numbers": wandb.Table(columns=head, data=lines),
        "table/references": wandb.Table(
            columns=["name", "metric", "row", "value", "source", "certainty"], data=of_others
        ),
    }
    if (plot := report.with_suffix(".png")).is_file():
        logged["table/plot"] = wandb.Image(str(plot))
    run.log(logged)
    place, address = Path(run.dir).parent, run.url if mode == "online" else None
    run.finish()
    return f"W&B: {address}" if address else f"W&B: offline; wandb sync {place}"


def _number(metrics: dict[str, Any], metric: str) -> float | None:
    return float(metrics[name]) if (name := named(metric, metrics)) else None


def _text(value: Any) -> str:
    return "" if value is None else str(value)
