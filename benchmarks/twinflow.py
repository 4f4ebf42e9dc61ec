"""TwinFlow beside flow matching and recursive consistency alone: one network, the same steps; and what a step costs.

`python -m penstock.benchmarks.twinflow` trains `twinflow_<suffix>` by each recipe and scores one, two and four calls a
sample; `--parts cost` times a training step of each, rivals taking turns, and counts the rows that the network sees.
Runs are kept in `--work`: the same command goes on where it was stopped. On CIFAR-10, from scratch, eight minutes each:
`--parts recipes --suffix cifar10 --recipes flow_matching rcgm twinflow --minutes 8 --word perf=bf16 --data FOLDER
--weights FILE --word callbacks.metrics.n=5000`.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from penstock.benchmarks.cifar10 import features, max_time
from penstock.benchmarks.launch import COST, kept
from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate
from penstock.kernels.philox import Draws
from penstock.lightning_modules.cli.compare import plot_calls
from penstock.lightning_modules.flow.blocks import Shares
from penstock.lightning_modules.flow.losses import SquaredError
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.twinflow import TwinFlow

PLAIN = ["model.enhanced_ratio=0"]
NO_TWIN = [*PLAIN, "model.shares.adv=0", "model.rectify=0"]
MATCHING = ["order=0", "consistency=0", "shares.e2e=0", "shares.any=0", "ema_decay=0", "sampler.style=mul"]
SHORTCUT = ["first_step=0", "near=0", "shares.mul=3", f"loss.class_path={SquaredError.__module__}.SquaredError"]
RECIPES = {
    "flow_matching": ("flow matching", [*NO_TWIN, *(f"model.{word}" for word in [*MATCHING, "sampler.noise=0"])]),
    "rcgm": ("any-step (RCGM, order 2)", NO_TWIN),
    "shortcut": ("shortcut model", [*NO_TWIN, *(f"model.{word}" for word in SHORTCUT)]),
    "adversarial": ("with the adversarial loss, without the rectification", [*PLAIN, "model.rectify=0"]),
    "twinflow": ("TwinFlow", PLAIN),
    "mild": ("TwinFlow, guidance of scale 1.05", ["model.enhanced_ratio=0.05"]),
    "guided": ("TwinFlow, guidance of scale 2", ["model.enhanced_ratio=0.5"]),
    "tuned": ("TwinFlow, fine-tuned from a trained flow", PLAIN),
}
ONLY_MUL = Shares(e2e=0.0, mul=1.0, any=0.0, adv=0.0)
NO_ADV = Shares(adv=0.0)
STEPS: dict[str, dict[str, Any]] = {
    "flow matching": {"order": 0, "consistency": 0.0, "shares": ONLY_MUL, "ema_decay": 0.0},
    "any-step, order 1": {"order": 1, "shares": NO_ADV, "rectify": 0.0},
    "any-step, order 2": {"shares": NO_ADV, "rectify": 0.0},
    "and the adversarial block": {"rectify": 0.0},
    "and the rectification: TwinFlow": {},
    "and guidance": {"enhanced_ratio": 0.5},
    "and no images": {"enhanced_ratio": 0.5, "image_free": True},
}


def recipes(given: Any) -> None:
    """Trains and scores each recipe; writes `twinflow_<suffix>`."""
    more = list(given.word)
    if given.data:
        more.append(f"data.data_dir={given.data.resolve()}")
    if given.weights:
        more.append(features(given.weights))
    if given.minutes:
        more += [f"trainer.max_time='{max_time(given.minutes)}'", "trainer.max_epochs=-1", "trainer.max_steps=-1"]
    rows, drawn, values = [], [], {}
    for recipe in given.recipes:
        name, words = RECIPES[recipe]
        found, tuned = [], recipe == "tuned"
        for seed in given.seeds[: 1 if recipe in given.once else None]:
            run = given.work.resolve() / f"{given.suffix}_{recipe}_seed{seed}"
            experiment = f"twinflow_{given.suffix}" + ("_tuned" if tuned else "")
            start = [f"teacher={given.teacher.resolve()}"] if given.teacher and tuned else []
            kept([f"experiment={experiment}", f"seed_everything={seed}", *words, *start, *more], run, given.threads)
            metrics = json.loads((run / "metrics.json").read_text())
            cost = json.loads((run / COST).read_text()) if (run / COST).is_file() else {}
            found.append({k: v for k, v in metrics.items() if "/" in k or k == "train_seconds"} | cost)
        values[name] = found
        scores = [k for k in found[0] if k.startswith(("fd_", "label_accuracy/")) and k.rpartition("/")[2].isdigit()]
        row = {"recipe": name} | {key: spread([each[key] for each in found]) for key in sorted(scores)}
        used = [each["cpu_seconds"] for each in found if "cpu_seconds" in each]
        rows.append(row | {"CPU, s": round(fmean(used)) if used else None, "seeds": len(found)})
        drawn.append({"name": name, "metrics": {key: fmean(each[key] for each in found) for key in scores}})
    called = f"twinflow_{given.suffix}"
    title = f"TwinFlow on {given.suffix}: distances and accuracy by network calls a sample"
    write(called, {"runs": values}, rows, title=title, seed=given.seeds[0], out=given.out)
    plot_calls(drawn, given.out / f"{called}.png")


def spread(values: Sequence[float]) -> str:
    """The mean, with the standard deviation over seeds where there are several."""
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def cost(given: Any) -> None:
    """Times a step of each setting; writes `twinflow_cost_<device>`."""
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    flows = {name: _flow(options, given, device) for name, options in STEPS.items()}
    seen = {name: _rows(flow, given.batch, device) for name, flow in flows.items()}
    steps = {name: partial(_step, flow, given.batch, device)() for name, flow in flows.items()}
    taken = alternate(steps, given.rounds, device)
    plain = median(taken["flow matching"])
    rows = []
    for name, step in steps.items():
        with_gradient, without = seen[name]
        rows.append(
            {
                "training step": name,
                "calls a sample with gradient": with_gradient / given.batch,
                "without": without / given.batch,
                "ms": 1e3 * median(taken[name]),
                "of flow matching": median(taken[name]) / plain,
                "forward passes, of flow matching's": (3 * with_gradient + without) / (3 * given.batch),
                "peak memory, MiB": _peak(step),
            }
        )
    title = f"A TwinFlow training step by what is in it, batch {given.batch}, {given.device}"
    write(f"twinflow_cost_{given.device}", {"seconds": taken}, rows, title=title, seed=given.seed, out=given.out)


def _flow(options: dict[str, Any], given: Any, device: torch.device) -> TwinFlow:
    torch.manual_seed(given.seed)
    net = UNet(tuple(given.shape), width=given.width, num_classes=10).to(device, memory_format=torch.channels_last)
    return TwinFlow(net, partial(torch.optim.Adam, lr=1e-3, fused=True), **options).to(device)


def _batch(flow: TwinFlow, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index = torch.arange(size, device=device)
    return torch.zeros(size, *flow.net.shape, device=device), index % 10, index


def _terms(flow: TwinFlow, size: int, device: torch.device) -> torch.Tensor:
    x1, label, index = _batch(flow, size, device)
    terms = flow.terms(x1, label, flow.drawn(x1, Draws(0, 0, index)))
    return terms.base.mean() + (0 if terms.rectify is None else flow.rectify * terms.rectify.mean())


def _step(flow: TwinFlow, size: int, device: torch.device) -> Callable[[], None]:
    optimizer = flow.optimizer([p for p in flow.parameters() if p.requires_grad])

    def step() -> None:
        _terms(flow, size, device).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _rows(flow: TwinFlow, size: int, device: torch.device) -> tuple[int, int]:
    """Rows that the network sees in a step, with gradient and without."""
    seen = {True: 0, False: 0}

    def count(net: torch.nn.Module, given: tuple, out: torch.Tensor) -> None:
        seen[out.requires_grad] += len(out)

    hook = flow.net.register_forward_hook(count)
    _terms(flow, size, device)
    hook.remove()
    return seen[True], seen[False]


def _peak(step: Callable[[], None]) -> float:
    """MiB of tensors that a step makes and holds at its worst moment, the weights and what was there before not."""
    step()
    with torch.profiler.profile(profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts asked for."""
    options = parser(__doc__)
    parts = {"recipes": recipes, "cost": cost}
    options.add_argument("--parts", nargs="+", choices=[*parts], default=[*parts])
    options.add_argument("--suffix", default="digits", help="of the experiments: twinflow_<suffix>")
    options.add_argument("--teacher", type=Path, help="a trained flow to tune; found or trained by default")
    options.add_argument("--recipes", nargs="+", choices=[*RECIPES], default=[*RECIPES], help="rows of the table")
    options.add_argument("--minutes", type=float, help="of each training, instead of the experiment's steps")
    options.add_argument("--data", type=Path, help="folder of the data set, where it is not embedded")
    options.add_argument("--weights", type=Path, help="MobileNetV2's weights: distances on its features alone")
    options.add_argument("--seeds", type=int, nargs="+", help="--seed by default")
    options.add_argument(
        "--once", nargs="+", choices=[*RECIPES], default=[], help="rows that take the first seed alone"
    )
    options.add_argument("--work", type=Path, default=Path("runs/twinflow"), help="folder that keeps the runs")
    options.add_argument("--word", action="append", default=[], help="a further word for penstock fit")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the cost")
    options.add_argument("--batch", type=int, default=128, help="of the cost")
    options.add_argument("--width", type=int, default=24, help="of the network of the cost")
    options.add_argument("--shape", type=int, nargs=3, default=[1, 8, 8], help="of the data of the cost")
    options.add_argument("--rounds", type=int, default=30, help="of the cost")
    given = options.parse_args(argv)
    given.seeds = given.seeds or [given.seed]
    for part in given.parts:
        parts[part](given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
