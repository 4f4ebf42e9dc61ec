"""CIFAR-10 with DDPM++ (61.8 M parameters) through the command line.

`python -m penstock.benchmarks.cifar10 --data FOLDER --weights FILE` on a CPU: 20 steps with every callback of the
experiment, the distance on MobileNetV2's features. `... --device cuda`: besides, images a second in bf16 +
channels_last + compile against plain fp32, turn by turn, and the distance during eight minutes of training.
"""

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from penstock.benchmarks.launch import fitted, kept
from penstock.benchmarks.report import parser, write

CALLBACKS = "penstock.lightning_modules.callbacks"


def features(weights: Path) -> str:
    """The word that scores samples by the Fréchet distance on MobileNetV2's pooled features."""
    extractor = (
        f"class_path:{CALLBACKS}.features.TimmFeatures,model:mobilenetv2_100,name:mobilenetv2,"
        f"weights:'{weights.resolve()}',pad_type:same,mean:[0.5,0.5,0.5],std:[0.5,0.5,0.5]"
    )
    return f"callbacks.metrics.metrics=[{{class_path:{CALLBACKS}.frechet.FrechetDistance,features:{{{extractor}}}}}]"


def readings(run: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in `metrics.csv`."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


def max_time(minutes: float) -> str:
    """Minutes, below a day, as days, hours, minutes and seconds: what `trainer.max_time` reads."""
    return f"00:{int(minutes // 60):02d}:{int(minutes % 60):02d}:{round(60 * (minutes % 1)):02d}"


def whole_run(words: list[str], steps: int, threads: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A few steps with every callback and two validations: what it measured and what the run folder holds."""
    own = [
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps // 2}",
        "trainer.check_val_every_n_epoch=1",
    ]
    own += ["callbacks.metrics.every_n_validations=1", f"trainer.log_every_n_steps={max(1, steps // 4)}"]
    with fitted([*words, *own], threads) as run:
        metrics = json.loads((run / "metrics.json").read_text())
        files = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    rows = [{"what": name, "value": value} for name, value in sorted(metrics.items())]
    return {"metrics": metrics, "files": files}, [*rows, {"what": "files of the run", "value": ", ".join(files)}]


def speed(
    words: list[str], perf: str, steps: int, rounds: int, threads: int | None
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Images a second of `perf` and of plain fp32, runs taking turns; the first half of each run is warm-up."""
    found: dict[str, list[float]] = {perf: [], "default": []}
    memory: dict[str, float] = {}
    own = [
        f"trainer.max_steps={steps}",
        "trainer.limit_val_batches=0",
        f"trainer.log_every_n_steps={max(1, steps // 20)}",
    ]
    own += ["callbacks.samples=null", "callbacks.metrics=null", "trainer.limit_test_batches=1"]
    for _ in range(rounds):
        for name in found:
            with fitted([*words, *own, f"perf={name}"], threads) as run:
                rates = [rate for _, rate in readings(run, "throughput/samples_per_second")]
                memory[name] = readings(run, "throughput/peak_memory_gib")[-1][1]
            found[name] += rates[len(rates) // 2 :]
    rows = [
        {
            "perf": name,
            "images/s": median(rates),
            "against default": median(rates) / median(found["default"]),
            "peak memory, GiB": memory[name],
        }
        for name, rates in found.items()
    ]
    return found, rows


def curve(
    words: list[str], perf: str, minutes: float, nfe: int, threads: int | None, run: Path | None
) -> list[dict[str, Any]]:
    """The distance against training time in a run of `minutes`, set-up and validation included; kept in `run`."""
    own = [f"trainer.max_time='{max_time(minutes)}'", f"perf={perf}"]
    own += ["trainer.max_steps=-1", "callbacks.ema.decay=0.999"]
    own += [f"callbacks.metrics.steps=[{nfe}]", "callbacks.metrics.every_n_validations=1", "model.scheduler.warmup=500"]
    name = f"fd_mobilenetv2/{nfe}"
    with fitted([*words, *own], threads) if run is None else nullcontext(run) as folder:
        if run is not None:
            kept([*words, *own], run, threads)
        distance, clock = readings(folder, name), readings(folder, "train_seconds")
    seconds = dict(clock)
    rows = []
    for step, value in distance:
        reached = [s for at, s in seconds.items() if at <= step]
        rows.append({"step": step, "training seconds": max(reached, default=None), name: value})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `cifar10_<device>_<part>.json` and `.md`."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="folder of the data set")
    options.add_argument("--weights", type=Path, required=True, help="MobileNetV2's weights (timm, safetensors)")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--parts", nargs="*", choices=["run", "speed", "curve"], help="what to measure")
    options.add_argument("--perf", default="fast", help="choice of conf/perf that is compared with the default")
    options.add_argument("--batch", type=int, help="4 on a CPU, 128 on a GPU by default")
    options.add_argument("--steps", type=int, default=20, help="of the run with every callback")
    options.add_argument("--speed-steps", type=int, default=400)
    options.add_argument("--rounds", type=int, default=3, help="runs of each setting in the comparison of speed")
    options.add_argument("--minutes", type=float, default=8.0)
    options.add_argument("--keep", type=Path, help="folder that keeps the run of the curve")
    options.add_argument("--every", type=int, default=2, help="epochs between two points of the curve")
    options.add_argument("--n", type=int, help="samples of a score; 20 on a CPU, 5000 on a GPU by default")
    options.add_argument("--limit", type=int, help="images of each split; 200 on a CPU, all on a GPU by default")
    options.add_argument("--word", action="append", default=[], help="a further word for penstock fit")
    given = options.parse_args(argv)
    gpu = given.device == "cuda"
    words = [
        "experiment=rectified_flow_cifar10",
        f"seed_everything={given.seed}",
        f"data.data_dir={given.data.resolve()}",
        "data.val_fraction=0.02",
        f"data.batch_size={given.batch or (128 if gpu else 4)}",
        "data.eval_batch_size=250" if gpu else "data.eval_batch_size=20",
        f"trainer.accelerator={'gpu' if gpu else 'cpu'}",
        "trainer.devices=1",
        features(given.weights),
        f"callbacks.metrics.n={given.n or (5000 if gpu else 20)}",
        "callbacks.samples.steps=10",
        "callbacks.samples.rows=2",
        *([] if gpu and given.limit is None else [f"data.limit={given.limit or 200}"]),
    ]
    few = ["callbacks.metrics.steps=[1,2]", "callbacks.samples.cols=4", "callbacks.samples.steps=2"]
    few += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    for part in given.parts or (["run", "speed", "curve"] if gpu else ["run"]):
        values: dict[str, Any] = {}
        if part == "run":
            title = f"CIFAR-10, DDPM++: {given.steps} steps with every callback on {given.device}"
            values, rows = whole_run([*words, *few, *given.word], given.steps, given.threads)
        elif part == "speed":
            title = f"CIFAR-10, DDPM++: training speed on {given.device}"
            few_images = ["data.limit=6400"] if gpu and given.limit is None else []
            rates, rows = speed(
                [*words, *few_images, *given.word], given.perf, given.speed_steps, given.rounds, given.threads
            )
            values = {"images_per_second": rates}
        else:
            title = f"CIFAR-10, DDPM++: distance during {given.minutes:g} minutes on {given.device}"
            every = f"trainer.check_val_every_n_epoch={given.every}"
            rows = curve([*words, every, *given.word], given.perf, given.minutes, 20, given.threads, given.keep)
        write(f"cifar10_{given.device}_{part}", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
