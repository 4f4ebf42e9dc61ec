"""FastFlow against anomalib 2.7.0 with the same weights: training on kept features, and inference of the whole model.

`pip install anomalib==2.7.0` first, in an environment of its own with this project; then
`python -m penstock.benchmarks.fastflow_peer --threads 1`, or `... --device cuda`. All take turns in one process, and
losses and maps are compared. anomalib's model is its own class; on MobileNetV2, which it does not offer, its class gets
that network from timm in place of ResNet18. It sees images normalised before, ours normalises them.

Exported models are ONNX files that onnxruntime and OpenVINO run: ours by `penstock export`, anomalib's by the exporter
and the options that it uses itself, without its pre- and post-processor. ncnn, which anomalib does not export to, is
ours alone. The best of each side is the fastest in float32; bfloat16 is what OpenVINO takes by itself on processors
that have it. Peak memory is that of a process that makes and runs one form of one model, less what imports and weights
need.
"""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from penstock.benchmarks.fastflow_peer_models import PEER, Pair, missing, ncnn, onnx, onnxruntime, openvino, pair
from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, ratio
from penstock.lightning_modules.feature_cache import FeatureCache
from penstock.lightning_modules.nets.fastflow import negative_log_likelihood

BACKBONES = ("mobilenetv2_100", "resnet18")
FORMS = ("eager", "torch.compile", "onnxruntime", "openvino", "openvino, bf16", "ncnn")
RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, "openvino, bf16": partial(openvino, precision="bf16")}
SIDES = ("penstock", PEER)
MAPS = {"openvino, bf16": 0.05}  # largest difference of maps
EXACT = 1e-4  # of the other forms
ALONE = ", alone"
LOSSES = 1e-4  # largest relative difference of losses
Work = Callable[[], Tensor]


class Trainer(NamedTuple):
    """What a step of training needs."""

    loss: Callable[[list[Tensor]], Tensor]
    optimizer: torch.optim.Optimizer


def trainer(side: str, models: Pair, compiled: bool = False) -> Trainer:
    """Flows with their norms, and Adam as both projects configure it; anomalib's by its own loss."""

    def ours(maps: list[Tensor]) -> Tensor:
        return negative_log_likelihood(models.ours.net.encode(maps)).mean()

    def theirs(maps: list[Tensor]) -> Tensor:
        from anomalib.models.image.fastflow.loss import FastflowLoss

        found = [flow(norm(y)) for flow, norm, y in zip(models.theirs.fast_flow_blocks, models.theirs.norms, maps)]
        return FastflowLoss()([z for z, _ in found], [logdet for _, logdet in found])

    loss, net = (ours, models.ours) if side == "penstock" else (theirs, models.theirs)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3, weight_decay=1e-5)
    return Trainer(torch.compile(loss, dynamic=False) if compiled else loss, optimizer)


def trained(one: Trainer, batches: Callable[[], Iterator[list[Tensor]]]) -> Tensor:
    """Losses of an epoch, on the device."""
    losses = []
    for maps in batches():
        one.optimizer.zero_grad()
        loss = one.loss(maps)
        loss.backward()
        one.optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def alike(found: dict[str, Tensor], limit: float, what: str) -> float:
    """Largest difference of two results relative to the largest value.

    Raises:
        RuntimeError: it is above `limit`.
    """
    one, other = (x.double().cpu() for x in found.values())
    error = ((one - other).abs().max() / other.abs().max()).item()
    if not error <= limit:
        raise RuntimeError(f"{what}: {' and '.join(found)} differ by {error:.2g}, expected at most {limit:g}")
    return error


def row(what: str, images: int, taken: dict[str, list[float]], error: float) -> dict[str, Any]:
    """A line of the table: images a second of both, or of ours alone, and how much faster ours is."""
    return {
        "work": what,
        **dict.fromkeys((f"{side}, images/s" for side in SIDES), None),
        **{f"{side}, images/s": images / median(times) for side, times in taken.items()},
        "ours / anomalib's": ratio(*reversed(taken.values())) if len(taken) > 1 else None,
        "largest difference": error,
    }


def training(models: Pair, batch: int, steps: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Epochs of `steps` batches of the features of random images."""
    device = models.ours.device
    cache = [models.ours.net.backbone(torch.rand(batch, 3, *models.size, device=device) * 2 - 1) for _ in range(steps)]
    both = {side: trainer(side, models, compiled) for side in SIDES}
    found = {side: trained(one, lambda: iter(2 * cache)) for side, one in both.items()}
    error = alike(found, LOSSES, "losses")
    works = {side: partial(trained, one, lambda: iter(cache)) for side, one in both.items()}
    taken = alternate(works, rounds, device, warmup=0)
    form = "torch.compile" if compiled else "eager"
    return row(f"{models.name}, training on kept features, batch {batch}, {form}", batch * steps, taken, error)


def cached(models: Callable[[], Pair], batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Epochs of our model with the features kept, and without, from the same weights."""
    works, first = {}, {}
    for name in ("kept features", "features made anew"):
        net = (made := models()).ours.net
        generator = torch.Generator().manual_seed(0)
        images = [torch.rand(batch, 3, *made.size, generator=generator).to(made.ours.device) for _ in range(steps)]
        cache = FeatureCache() if name == "kept features" else None

        def batches(net=net, images=images, cache=cache) -> Iterator[list[Tensor]]:
            for k, image in enumerate(images):
                index = torch.arange(k * batch, (k + 1) * batch)
                yield net.backbone(image) if cache is None else cache(index, image, net.backbone)

        works[name] = partial(trained, trainer("penstock", made), batches)
        first[name] = torch.cat([works[name](), works[name]()])
    error = alike(first, 0, "losses with and without kept features")
    taken = alternate(works, rounds, made.ours.device, warmup=0)
    epochs = {f"epochs/s, {name}": 1 / median(times) for name, times in taken.items()}
    return {"backbone": made.name, **epochs, "faster by": ratio(*reversed(taken.values())), "largest difference": error}


def detectors(
    models: Pair, form: str, batch: int, folder: Path, threads: int, sides: Sequence[str] = SIDES
) -> dict[str, Work]:
    """Maps `(B, 1, H, W)` of one batch of images by each side in one form; of ncnn by ours.

    A form may end in `, alone`: the images go in one by one.
    """
    torch.manual_seed(1)
    image = torch.rand(batch, 3, *models.size, device=models.ours.device)
    backbone = models.ours.net.backbone
    kind, works = form.removesuffix(ALONE), {}
    size = 1 if form != kind or kind == "ncnn" else batch
    for side in sides:
        ours = side == SIDES[0]
        module: nn.Module = models.ours.exportable()[0] if ours else models.theirs
        x = image if ours else (image - backbone.mean) / backbone.std
        if kind in RUNTIMES:
            file = onnx(module, x, folder / f"{'ours' if ours else 'theirs'}.onnx", ours)
            call = RUNTIMES[kind](file, x[:size].shape, threads)
        elif kind == "ncnn":
            if not ours:
                continue
            call = ncnn(module, x, folder / "ours.ncnn", threads)
        else:
            if kind == "torch.compile":
                module = torch.compile(module, dynamic=False)
            pick = (lambda y: y[1]) if ours else (lambda y: y.anomaly_map)
            call = torch.inference_mode()(lambda x, module=module, pick=pick: pick(module(x)))
        works[side] = lambda call=call, x=x: torch.cat([call(part) for part in x.split(size)])
    return works


def inference(models: Pair, forms: Sequence[str], batch: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A line of every form, and of the best one of each side."""
    rows, device = [], models.ours.device
    with TemporaryDirectory() as folder:
        works = {form: detectors(models, form, batch, Path(folder), threads) for form in forms}
        reference = works["eager"][PEER]()
        errors = {
            form: max(
                alike({side: work(), PEER + " eager": reference}, MAPS.get(form.removesuffix(ALONE), EXACT), form)
                for side, work in both.items()
            )
            for form, both in works.items()
        }
        flat = {str((form, side)): work for form, both in works.items() for side, work in both.items()}
        taken = alternate(flat, rounds, device)
    name = f"{models.name}, inference, batch {batch}"

    def times(form: str) -> dict[str, list[float]]:
        return {side: taken[str((form, side))] for side in works[form]}

    exact = [form for form in forms if form.removesuffix(ALONE) not in MAPS]
    best = {
        side: min((f for f in exact if side in works[f]), key=lambda form: median(times(form)[side])) for side in SIDES
    }
    for form in forms:
        rows.append(row(f"{name}, {form}", batch, times(form), errors[form]))
    fastest = {side: times(form)[side] for side, form in best.items()}
    largest = max(errors[form] for form in exact)
    rows.append(row(f"{name}, best: {' against '.join(best.values())}", batch, fastest, largest))
    return rows


def grown(models: Pair, form: str, batch: int, side: str, threads: int) -> float:
    """MiB of memory that one form of one model needs at its worst moment beyond what imports and weights need."""
    device = models.ours.device
    with TemporaryDirectory() as folder:
        work = detectors(models, form, batch, Path(folder), threads, [side])[side]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            work()
            return (torch.cuda.max_memory_allocated(device) - before) / 2**20
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        for _ in range(2):
            work()
        return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def memory(words: list[str], backbone: str, forms: Sequence[str], batches: Sequence[int]) -> list[dict[str, Any]]:
    """A line of each form and batch, every figure by a process of its own."""
    rows = []
    for form, batch in ((f, b) for b in batches for f in forms):
        line: dict[str, Any] = {"model": f"{backbone}, batch {batch}, {form}"}
        line |= dict.fromkeys((f"{side}, peak MiB" for side in SIDES), None)
        for side in SIDES[: 1 if form == "ncnn" else 2]:
            own = ["--memory-of", backbone, form, str(batch), side]
            command = [sys.executable, "-m", "penstock.benchmarks.fastflow_peer", *words, *own]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            line[f"{side}, peak MiB"] = float(found.stdout.split()[-1])
        rows.append(line)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `fastflow_peer_<device>.json` and `.md`, and `..._cache_...`, `..._memory_...`."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--steps", type=int, default=3, help="batches of an epoch")
    options.add_argument("--side", type=int, default=256, help="of the images, pixels")
    options.add_argument("--backbones", nargs="+", default=BACKBONES)
    options.add_argument("--weights", help="file of the first backbone's; random by default")
    options.add_argument("--no-compile", action="store_true", help="leaves torch.compile out")
    what = options.add_mutually_exclusive_group()
    what.add_argument("--no-memory", action="store_true", help="leaves peak memory out")
    what.add_argument("--only-memory", action="store_true", help="measures peak memory alone")
    options.add_argument("--memory-of", nargs=4, help="prints peak MiB of a backbone, form, batch, side")
    given = options.parse_args(argv)
    if problem := missing():
        print(problem, file=sys.stderr)
        return 2
    if given.threads:
        torch.set_num_threads(given.threads)
    threads, device = torch.get_num_threads(), torch.device(given.device)

    def models(backbone: str) -> Pair:
        weights = given.weights if backbone == given.backbones[0] else None
        return pair(backbone, given.side, device, given.seed, weights)

    if given.memory_of:
        backbone, form, batch, side = given.memory_of
        print(grown(models(backbone), form, int(batch), side, threads))
        return 0
    forms = [form for form in FORMS if not (given.no_compile and form == "torch.compile")]
    if given.device == "cuda":
        forms = [form for form in forms if form in ("eager", "torch.compile")]
    rows, kept, peaks = [], [], []
    for backbone in given.backbones:
        if not given.no_memory:
            words = ["--device", given.device, "--threads", str(threads), "--side", str(given.side)]
            simple = [form for form in forms if form not in ("torch.compile", "openvino, bf16")]
            peaks += memory(words, backbone, simple, (1, given.batch))
        if given.only_memory:
            continue
        fresh = partial(models, backbone)
        for compiled in (False,) if given.no_compile else (False, True):
            rows.append(training(fresh(), given.batch, given.steps, given.rounds, compiled))
            print(rows[-1], file=sys.stderr)
            torch.compiler.reset()
        kept.append(cached(fresh, given.batch, given.steps, max(2, given.rounds // 2)))
        for batch in (1, given.batch):
            own = [*forms, *(form + ALONE for form in forms if form in RUNTIMES and batch > 1)]
            rows += inference(fresh(), own, batch, given.rounds * (1 if batch > 1 else 5), threads)
            print(*rows[-len(own) - 1 :], sep="\n", file=sys.stderr)
            torch.compiler.reset()
    title = f"FastFlow of Penstock against {PEER} on {given.device}, {given.side} px"
    values = {"batch": given.batch, "steps": given.steps, "kept_features": kept, "peak_memory": peaks}
    name = f"fastflow_peer_{given.device}"
    common = {"seed": given.seed, "out": given.out}
    if rows:
        cached_title = "FastFlow with and without kept features"
        write(name, values, rows, title=title, **common)
        write(f"fastflow_peer_cache_{given.device}", {}, kept, title=cached_title, **common)
    if peaks:
        write(f"fastflow_peer_memory_{given.device}", {}, peaks, title=f"Peak memory of {title}", **common)
    return 0


if __name__ == "__main__":
    sys.exit(main())
