"""A trained flow and those that start from it, at 1, 2, 4 and 8 network calls a sample, all from the same teacher.

`python -m penstock.benchmarks.fast_flows --data FOLDER --weights FILE` trains `rectified_flow_<suffix>` for every seed,
then each method from it. Reflow, distillation and 2-rectified flow++ share pairs, initial weights, steps and batch;
distillation and BOSS train a network for each number of calls. Runs are kept in `--work`: the same command goes on
where it was stopped, and the tables are written anew after every run. The distances are against the test images.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from penstock.benchmarks.launch import COST, kept, process
from penstock.benchmarks.report import parser, write
from penstock.lightning_modules.cli.compare import plot_calls

TEACHER = "rectified_flow"
NAMES = {
    TEACHER: "rectified flow, the teacher",
    "reflow": "2-rectified flow",
    "distill": "distilled, a network for each number of calls",
    "rectified_flow_pp": "2-rectified flow++ (config D)",
    "boss": "BOSS, a network for each number of calls",
}
SEARCHED = "the teacher, Bellman steps, untuned"
GRID = "penstock.lightning_modules.flow.times.Grid"


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        method: A key of `NAMES`.
        seed: Of the run and of its teacher.
        k: Network calls that the run trains for; None where one network serves all.
    """

    method: str
    seed: int
    k: int | None = None

    @property
    def name(self) -> str:
        """Of the run folder."""
        return f"{self.method}{'' if self.k is None else f'_{self.k}'}_seed{self.seed}"

    def words(self) -> list[str]:
        """What the run trains for."""
        if self.method == "boss":
            return [f"model.k={self.k}"]
        if self.method == "distill" and self.k != 1:
            return [f"model.times.class_path={GRID}", f"model.times.k={self.k}"]
        return []

    def steps(self, nfe: Sequence[int]) -> list[str]:
        """The numbers of steps at which the run is scored."""
        if self.k is not None:
            return [str(self.k)]
        searched = [f"bellman:{k}" for k in nfe if k > 1] if self.method == TEACHER else []
        return [*map(str, nfe), *searched]


def stages(methods: Sequence[str], seeds: Sequence[int], nfe: Sequence[int]) -> list[Stage]:
    """All runs but the teachers, those of one network first."""
    found = []
    for method in sorted(methods, key=lambda m: m in ("distill", "boss")):
        for k in nfe if method in ("distill", "boss") else [None]:
            found += [Stage(method, seed, k) for seed in seeds]
    return found


class Laboratory:
    """Trains and scores runs in a folder that keeps them.

    Args:
        given: The command line.
    """

    def __init__(self, given: Any):
        self.given, self.work = given, given.work.resolve()
        self.n = given.n or (5000 if given.device == "cuda" else 2000)

    def train(self, stage: Stage) -> None:
        """Trains, or goes on, as far as that has not been done."""
        given, of_teacher = self.given, stage.method == TEACHER
        words = [f"experiment={stage.method}_{given.suffix}", f"seed_everything={stage.seed}"]
        if given.data:
            words.append(f"data.{'' if of_teacher else 'real.'}data_dir={given.data.resolve()}")
        if not of_teacher:
            words.append(f"teacher={self.work / Stage(TEACHER, stage.seed).name}")
        words += [f"trainer.accelerator={'gpu' if given.device == 'cuda' else 'cpu'}", "trainer.devices=1"]
        words += ["callbacks.metrics=null", *stage.words(), *own(given.word, stage.method)]
        kept(words, self.work / stage.name, given.threads)

    def run(self, stage: Stage) -> None:
        """Trains and scores, as far as that has not been done."""
        self.train(stage)
        given, run = self.given, self.work / stage.name
        steps, found = stage.steps(given.nfe), self.scores(stage)
        if found and all(set(map(label, steps)) <= set(values) for values in found.values()):
            return
        command = [sys.executable, "-m", "penstock.benchmarks.scores", str(run / "checkpoints" / "last.ckpt")]
        command += ["--real", f"{TEACHER}_{given.suffix}", "--n", str(self.n), "--device", given.device]
        command += ["--data", str(given.data.resolve())] if given.data else []
        command += ["--weights", str(given.weights.resolve())] if given.weights else []
        process([*command, "--steps", *steps, "--to", str(run / f"scores_{self.n}.json")], {}, given.threads)

    def scores(self, stage: Stage) -> dict[str, dict[str, float]]:
        """Metric -> calls (`4`, `bellman-4`) -> value; empty for a run that is not there yet."""
        path = self.work / stage.name / f"scores_{self.n}.json"
        found: dict[str, dict[str, float]] = {}
        for key, value in (json.loads(path.read_text()) if path.is_file() else {}).items():
            metric, _, calls = key.rpartition("/")
            found.setdefault(metric, {})[calls] = value
        return found

    def costs(self, stage: Stage) -> dict[str, float]:
        """Steps and seconds of training; `seconds` and `cpu_seconds` of the whole process, if it was never stopped."""
        run = self.work / stage.name
        if not (run / "metrics.json").is_file():
            return {}
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            steps = max(int(line.split(",")[0]) for line in list(file)[1:])
        found = {"steps": steps, "train_seconds": json.loads((run / "metrics.json").read_text())["train_seconds"]}
        whole = run / COST
        return found | (json.loads(whole.read_text()) if whole.is_file() else {})


def own(words: Sequence[str], method: str) -> Iterator[str]:
    """Of words such as `model.net.width=64` or, for one method only, `reflow:model.lr=1e-4`, those of `method`."""
    for word in words:
        whose, colon, rest = word.partition(":")
        if not (colon and whose in NAMES):
            yield word
        elif whose == method:
            yield rest


def label(steps: str) -> str:
    """`4` or `bellman-4`, as metrics are called, of what `--steps` takes."""
    return steps.replace(":", "-")


def spread(values: Sequence[float]) -> str | None:
    """The mean, with the standard deviation over seeds where there are several."""
    if not values:
        return None
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def tables(lab: Laboratory, methods: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict]]:
    """All values, the rows of the table, and what `plot_calls` draws, of the runs that are scored."""
    seeds, nfe = lab.given.seeds, lab.given.nfe
    every = [Stage(TEACHER, seed) for seed in seeds] + stages(methods, seeds, nfe)
    runs = [stage for stage in every if lab.scores(stage)]
    values = {
        s.name: lab.costs(s) | {f"{m}/{k}": v for m, d in lab.scores(s).items() for k, v in d.items()} for s in runs
    }
    metrics = list(dict.fromkeys(metric for stage in runs for metric in lab.scores(stage)))
    rows, drawn = [], []
    for method, name, prefix in [(TEACHER, NAMES[TEACHER], ""), (TEACHER, SEARCHED, "bellman-")] + [
        (method, NAMES[method], "") for method in methods
    ]:
        mine = [stage for stage in runs if stage.method == method]
        found = {
            f"{metric}/{k}": [values[s.name][key] for s in mine if (key := f"{metric}/{prefix}{k}") in values[s.name]]
            for metric in metrics
            for k in nfe
        }
        if not any(found.values()):
            continue
        costs = [lab.costs(stage) for stage in mine]
        row: dict[str, Any] = {"flow": name} | {key: spread(each) for key, each in found.items()}
        whole = {key: [cost[key] for cost in costs if key in cost] for key in ("seconds", "cpu_seconds")}
        row |= {
            "training, s": round(fmean(cost["train_seconds"] for cost in costs)) if not prefix else 0,
            "whole process, s": round(fmean(whole["seconds"])) if whole["seconds"] and not prefix else None,
            "its CPU time, s": round(fmean(whole["cpu_seconds"])) if whole["cpu_seconds"] and not prefix else None,
            "steps": costs[0]["steps"] if not prefix else 0,
            "seeds": len({stage.seed for stage in mine}),
        }
        rows.append(row)
        drawn.append({"name": name, "metrics": {key: fmean(value) for key, value in found.items() if value}})
    return values, rows, drawn


def publish(lab: Laboratory, methods: Sequence[str]) -> None:
    """Writes the tables and the picture of the runs that are there."""
    given = lab.given
    values, rows, drawn = tables(lab, methods)
    if not rows:
        return
    title = f"Fast flows on {given.suffix}: Fréchet distance by network calls a sample, {lab.n} samples, {given.device}"
    write(f"fast_flows_{given.device}", {"runs": values}, rows, title=title, seed=given.seeds[0], out=given.out)
    plot_calls(drawn, given.out / f"fast_flows_{given.device}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and writes `fast_flows_<device>.json`, `.md` and `.png`."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder of the data set")
    options.add_argument("--weights", type=Path, help="MobileNetV2's weights (timm, safetensors); pixels only without")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--suffix", default="cifar10_16", help="of the experiments: rectified_flow_<suffix>, ...")
    options.add_argument("--methods", nargs="*", choices=[m for m in NAMES if m != TEACHER], help="all by default")
    options.add_argument("--seeds", type=int, nargs="+", help="--seed by default")
    options.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4, 8], help="network calls a sample")
    options.add_argument("--n", type=int, help="samples of a score; 2000 on a CPU, 5000 on a GPU by default")
    options.add_argument("--work", type=Path, default=Path("runs/fast_flows"), help="folder that keeps the runs")
    options.add_argument("--jobs", type=int, default=1, help="runs at once")
    options.add_argument(
        "--word", action="append", default=[], help="a further word for penstock fit, METHOD:word for those of one"
    )
    given = options.parse_args(argv)
    given.seeds = given.seeds or [given.seed]
    methods = [m for m in NAMES if m != TEACHER] if given.methods is None else given.methods
    lab = Laboratory(given)
    teachers = [Stage(TEACHER, seed) for seed in given.seeds]
    with ThreadPoolExecutor(given.jobs) as pool:
        for work, batch in ((lab.train, teachers), (lab.run, [*teachers, *stages(methods, given.seeds, given.nfe)])):
            for done in as_completed([pool.submit(work, stage) for stage in batch]):
                if error := done.exception():
                    pool.shutdown(cancel_futures=True)
                    raise error
                publish(lab, methods)
    publish(lab, methods)
    return 0


if __name__ == "__main__":
    sys.exit(main())
