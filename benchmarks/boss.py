"""Tables 1 and 2 of BOSS (arXiv 2312.16414) in small: steps of a trained flow, and what fine-tuning to K steps gives.

`python -m penstock.benchmarks.boss --suffix digits` scores the teacher with equal and with Bellman steps, then the
fine-tunes of `boss_<suffix>`, `boss_<suffix>_uniform_reflow` and `boss_<suffix>_distill` on the same pairs with the
same budget. `--suffix cifar10 --data FOLDER --weights FILE` measures the distance on MobileNetV2's features. Everything
runs through the command line; `--word` goes to all runs, `--steps-word` and `--tune-word` to those of one part. With
`--runs` the run folders stay, and what has finished there is not run again.
"""

import csv
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml

from penstock.benchmarks.cifar10 import features
from penstock.benchmarks.launch import kept, process
from penstock.benchmarks.report import parser, write
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.teacher import find_or_train

METHODS = {"BOSS": "", "Uniform-Reflow": "_uniform_reflow", "Distill-k-Reflow": "_distill"}
NEVER = 10**6


class Setting(NamedTuple):
    """What all runs of a call share.

    Attributes:
        suffix: of the experiments' names.
        teacher: checkpoint.
        metric: that is compared, without the number of calls.
        k_max: steps of the fine grid, which are those of the pairs too.
        words: for every run.
        threads: CPU threads of a run.
        runs: where the run folders are.
    """

    suffix: str
    teacher: str
    metric: str
    k_max: int
    words: list[str]
    threads: int | None
    runs: Path


def scored(setting: Setting, lengths: Sequence[int], words: list[str], seed: int) -> dict[str, float]:
    """Metrics of the teacher at each length, with equal steps and with Bellman steps; the noise is that of `seed`."""
    run = setting.runs / f"steps_{seed}"
    run.mkdir(parents=True, exist_ok=True)
    steps = [*map(str, lengths), *(f"bellman:{k}/{setting.k_max}" for k in lengths)]
    file, wanted = run / "metrics.json", {f"{setting.metric}/bellman-{k}" for k in lengths}
    if not file.is_file() or wanted - json.loads(file.read_text()).keys():
        own = [f"experiment=rectified_flow_{setting.suffix}", f"ckpt_path={setting.teacher}", "logger=csv"]
        own += [f"callbacks.metrics.steps=[{','.join(steps)}]", f"callbacks.metrics.seed={seed}"]
        own += ["callbacks.samples=null", "trainer.limit_test_batches=1"]
        command = [sys.executable, "-m", "penstock.lightning_modules", "test", *own, *setting.words, *words]
        process(command, {"RUN_DIR": str(run)}, setting.threads, run / "test.log")
    return json.loads(file.read_text())


def tuned(setting: Setting, words: list[str], job: tuple[str, int, int]) -> dict[str, Any]:
    """Metrics of one fine-tune `(method, K, seed)`, the updates it made, its batch and pairs."""
    method, k, seed = job
    run = setting.runs / f"{method}_{k}_{seed}"
    own = [
        f"experiment=boss_{setting.suffix}{METHODS[method]}",
        f"teacher={setting.teacher}",
        f"seed_everything={seed}",
    ]
    own += [f"data.keep=bellman:{k}", f"data.steps={setting.k_max}", f"callbacks.metrics.steps=[{k}]"]
    own += [f"seed_everything={seed}", f"callbacks.metrics.seed={seed}", f"callbacks.samples.steps={k}"]
    own += [f"callbacks.checkpoint.every_n_epochs={NEVER}"]
    own += {"BOSS": [f"model.k={k}"], "Distill-k-Reflow": [f"model.times.k={k}"]}.get(method, [])
    kept([*own, *setting.words, *words], run, setting.threads)
    data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        updates = max(int(row["step"]) for row in csv.DictReader(file) if row["step"])
    metrics = json.loads((run / "metrics.json").read_text())
    return metrics | {"updates": updates, "batch": data["batch_size"], "pairs": data["n"]}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def steps_row(metric: str, k: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    """A line of Table 1: K equal steps against K Bellman steps, on the same noise."""
    equal, best = ([run[f"{metric}/{name}"] for run in runs] for name in (f"{k}", f"bellman-{k}"))
    return {
        "calls": k,
        f"{metric}, equal steps": spread(equal),
        "Bellman steps": spread(best),
        "Bellman / equal": mean(best) / mean(equal),
        "seeds": len(runs),
        "seeds in which Bellman is no worse": sum(b <= e for b, e in zip(best, equal)),
    }


def tune_row(metric: str, k: int, name: str, runs: list[dict[str, Any]], untuned: float) -> dict[str, Any]:
    """A line of Table 2; `untuned` is the teacher with Bellman steps."""
    values = [run[f"{metric}/{k}"] for run in runs]
    return {
        "calls": k,
        "fine-tune": name,
        metric: spread(values),
        "against untuned Bellman steps": mean(values) / untuned,
        "seeds": len(runs),
        "updates": mean(run["updates"] for run in runs) or None,
        "batch": runs[0]["batch"],
        "pairs": runs[0]["pairs"],
        "training minutes": mean(run["train_seconds"] for run in runs) / 60 if runs[0]["updates"] else None,
    }


def table_2(setting: Setting, lengths: Sequence[int], scores: list[dict], runs: dict[tuple, dict]) -> list[dict]:
    """All lines of Table 2: the teacher with equal and Bellman steps, and the three fine-tunes, for each length."""
    rows = []
    for k in lengths:
        none = {"updates": 0, "batch": None, "pairs": None}
        names = {"none, equal steps": f"{setting.metric}/{k}", "none, Bellman steps": f"{setting.metric}/bellman-{k}"}
        untuned = mean(run[f"{setting.metric}/bellman-{k}"] for run in scores)
        for name, key in names.items():
            own = [{f"{setting.metric}/{k}": run[key], **none} for run in scores]
            rows.append(tune_row(setting.metric, k, name, own, untuned))
        for method in METHODS:
            done = [run for (m, length, _), run in runs.items() if (m, length) == (method, k)]
            rows.append(tune_row(setting.metric, k, method, done, untuned))
    return rows


def _k_max(suffix: str) -> int:
    return compose([f"experiment=boss_{suffix}"])[0]["data"]["init_args"]["steps"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `boss_<suffix>_<device>_<part>.json` and `.md`."""
    options = parser(__doc__)
    options.add_argument("--suffix", default="digits", help="of the experiments, as in boss_<suffix>")
    options.add_argument("--teacher", help="checkpoint, run or experiment; rectified_flow_<suffix> by default")
    options.add_argument("--parts", nargs="+", default=["steps", "tune"], choices=["steps", "tune"])
    options.add_argument("--lengths", type=int, nargs="+", default=[4, 6, 8], help="numbers of steps of the teacher")
    options.add_argument("--tune", type=int, nargs="+", default=[4], help="numbers of steps to fine-tune to")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise and of training")
    options.add_argument("--tune-seeds", type=int, nargs="+", help="how many of the seeds each of --tune gets; all")
    options.add_argument("--k-max", type=int, help="steps of the fine grid; those of boss_<suffix> by default")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--data", type=Path, help="folder of the data set, where it is not embedded")
    options.add_argument("--weights", type=Path, help="MobileNetV2's weights: score on its features")
    options.add_argument("--metric", help="that is compared; fd_pixels, or with --weights fd_mobilenetv2 by default")
    options.add_argument("--word", action="append", default=[], help="a further word for every run")
    options.add_argument("--steps-word", action="append", default=[], help="a further word for the teacher's scores")
    options.add_argument("--tune-word", action="append", default=[], help="a further word for the fine-tunes")
    options.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options.add_argument("--runs", type=Path, help="folder that keeps the runs")
    given = options.parse_args(argv)
    teacher = str(Path(find_or_train(given.teacher or f"rectified_flow_{given.suffix}")).resolve())
    words = [f"trainer.accelerator={'gpu' if given.device == 'cuda' else 'cpu'}", "trainer.devices=1"]
    words += [features(given.weights)] if given.weights else []
    metric = given.metric or ("fd_mobilenetv2" if given.weights else "fd_pixels")
    steps_words, tune_words = list(given.steps_word), list(given.tune_word)
    if given.data:
        steps_words = [f"data.data_dir={given.data.resolve()}", "data.val_fraction=0", *steps_words]
        tune_words = [f"data.real.data_dir={given.data.resolve()}", *tune_words]
    counts = given.tune_seeds or [len(given.seeds)] * len(given.tune)
    asked = {"steps": given.lengths, "tune": given.tune}
    with TemporaryDirectory() as temporary, ThreadPoolExecutor(given.jobs) as pool:
        k_max, runs = given.k_max or _k_max(given.suffix), given.runs or Path(temporary)
        setting = Setting(given.suffix, teacher, metric, k_max, [*words, *given.word], given.threads, runs.resolve())
        lengths = sorted({k for part in given.parts for k in asked[part]})
        scores = list(pool.map(partial(scored, setting, lengths, steps_words), given.seeds))
        about = f"{given.suffix}, one teacher, K_max = {k_max}, {given.device}"
        save = partial(write, seed=given.seeds[0], out=given.out)
        if "steps" in given.parts:
            rows = [steps_row(metric, k, scores) for k in given.lengths]
            title = f"Equal and Bellman steps of a rectified flow: {about}"
            save(f"boss_{given.suffix}_{given.device}_steps", {"scores": scores}, rows, title=title)
        if "tune" in given.parts:
            jobs = [(m, k, s) for k, n in zip(given.tune, counts) for s in given.seeds[:n] for m in METHODS]
            done = dict(zip(jobs, pool.map(partial(tuned, setting, tune_words), jobs)))
            rows = table_2(setting, given.tune, scores, done)
            values = {"runs": [{"method": m, "k": k, "seed": s, **run} for (m, k, s), run in done.items()]}
            title = f"Fine-tuning to K steps: {about}; seeds are those of training and of the scored noise"
            save(f"boss_{given.suffix}_{given.device}_tune", values, rows, title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
