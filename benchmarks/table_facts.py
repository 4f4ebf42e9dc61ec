"""What a number of a table hangs on: read off a run's config.yaml, facts.json and the names of its metrics."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from penstock.lightning_modules.cli.run_facts import FACTS
from penstock.lightning_modules.steps import CALLS

PARTS_OF_A_MIX = ("image", "short")


def of_run(folder: Path) -> dict[str, Any]:
    """What the files of a finished run say; null where they do not, or where it does not apply.

    Returns:
        `seed`; of a fit `epochs` and `steps`, where they limit it, `batch` of all ranks, `accumulation`, batches of a
        step, and `global_batch`, their product; `ranks`; `split`, what is scored: of the test, and of each metric that
        names one; `features`, networks that metrics are measured with; `ema`, the decay of the averaged weights that
        are scored, or `none`.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    path = folder / FACTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    trainer, classes = config["trainer"], [*_classes(config["trainer"].get("callbacks"))]
    trained = not path.is_file() or known["accumulation"] is not None
    accumulation = (trainer.get("accumulate_grad_batches") or 1) if trained else None
    batch = batch_of(config["data"]) if trained else None
    return {
        "seed": config["seed_everything"],
        "epochs": _length(trainer, "max_epochs") if trained else None,
        "steps": _length(trainer, "max_steps") if trained else None,
        "batch": batch,
        "accumulation": accumulation,
        "global_batch": batch * accumulation if isinstance(batch, int) and accumulation else batch,
        "ranks": known.get("ranks", _ranks(trainer)),
        "split": _splits(classes, known.get("split")),
        "features": _features(classes),
        "ema": _ema(classes),
    }


def batch_of(data: dict[str, Any]) -> int | str | None:
    """Training batch of a data module, over all ranks, or of the one that it wraps; of a mix each part's."""
    own = data.get("init_args") or {}
    inner = own.get("data") or own.get("video")
    size = own.get("batch_size") or (batch_of(inner) if isinstance(inner, dict) else None)
    others = {name: own[name] for name in PARTS_OF_A_MIX if isinstance(own.get(name), dict)}
    parts = [f"{name} {batch_of(other)}" for name, other in others.items()]
    return ", ".join([str(size), *parts]) if parts else size


def named(metric: str, metrics: dict[str, Any]) -> str | None:
    """A metric's name in a run: itself, of `fid/*` that of the most network calls; None where the run has none."""
    if not metric.endswith("/*"):
        return metric if metric in metrics else None
    found = [re.fullmatch(re.escape(metric[:-1]) + r"(\d+)", name) for name in metrics]
    return max((match for match in found if match), key=lambda match: int(match[1]), default=[None])[0]


def calls_of(metric: str, metrics: dict[str, Any]) -> int | None:
    """Network calls a sample behind a metric, from its name: of `fid/2` two, of `fid/bellman-4` four.

    Where calls depend on the samples the run measured them: then what `network_calls/k` says. None of metrics that
    draw no samples.
    """
    match = re.fullmatch(r".+/(?:bellman-)?(\d+)", metric)
    return round(float(metrics.get(f"{CALLS}/{match[1]}", match[1]))) if match else None


def _length(trainer: dict[str, Any], key: str) -> int | None:
    """A limit of training; None where there is none."""
    return length if (length := trainer.get(key) or -1) > 0 else None


def _ranks(trainer: dict[str, Any]) -> int | None:
    """Ranks that a configuration asks for; None where it leaves them to the machine."""
    devices = str(trainer.get("devices"))
    return int(devices) * int(trainer.get("num_nodes") or 1) if devices.isdigit() else None


def _splits(classes: list[dict[str, Any]], tested: str | None) -> str | None:
    own = {f"{_short(node)} {node['init_args']['split']}" for node in classes if _has(node, "split")}
    return ", ".join([*([tested] if tested else []), *sorted(own)]) or None


def _features(classes: list[dict[str, Any]]) -> str | None:
    """Networks, with model and weights, that metrics compare samples by; pixels are no network but are named too."""
    found = [node["init_args"]["features"] for node in classes if _has(node, "features")]
    found += [node for node in classes if _short(node) == "ClipScore"]
    return ", ".join(dict.fromkeys(_described(node) for node in found if isinstance(node, dict))) or None


def _ema(classes: list[dict[str, Any]]) -> float | str:
    return next((node["init_args"]["decay"] for node in classes if _short(node) == "EMA"), "none")


def _described(node: dict[str, Any]) -> str:
    own = node.get("init_args") or {}
    inner = own.get("features")
    parts = [_described(inner)] if isinstance(inner, dict) else []
    parts += [Path(str(own[key])).name for key in ("model", "weights") if own.get(key)]
    return f"{_short(node)} ({', '.join(parts)})" if parts else _short(node)


def _classes(node: Any) -> Iterator[dict[str, Any]]:
    """Every class in a configuration, at any depth, from outside in, with `init_args`."""
    if isinstance(node, list):
        for item in node:
            yield from _classes(item)
    elif isinstance(node, dict):
        if "class_path" in node:
            yield node | {"init_args": node.get("init_args") or {}}
        for value in node.values():
            yield from _classes(value)


def _has(node: dict[str, Any], key: str) -> bool:
    return bool(node["init_args"].get(key))


def _short(node: dict[str, Any]) -> str:
    return node["class_path"].rpartition(".")[2]
