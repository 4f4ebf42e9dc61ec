"""`penstock sample ckpt_path=... n=64 steps=4`: pictures or clips, the raw tensor, and the time a sample takes."""

import inspect
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

from penstock.lightning_modules.cli.compose import nest_init_args
from penstock.lightning_modules.cli.given import check_keys, solver_config, split, typed, usable_device
from penstock.lightning_modules.cli.out import check_no_file, made, together
from penstock.lightning_modules.cli.verbs import run_of_checkpoint
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.steps import Bellman, parse_steps

OWN = {"ckpt_path": str, "n": int, "steps": str, "seed": int, "labels": str, "batch": int, "out": str, "device": str}
OWN |= {"solver": str, "inverse": str, "aspect": str}
SEEDS = (-(2**63), 2**64 - 1)  # what torch takes


def _options(model: Any) -> dict[str, type]:
    """Further keyword options of the model's `sample`: name -> int, float, bool or str."""
    found = {}
    for name, parameter in inspect.signature(model.sample).parameters.items():
        kinds = [k for k in (get_args(parameter.annotation) or (parameter.annotation,)) if k in (int, float, str)]
        if name not in ("n", "steps", "cond", "generator") and kinds:
            found[name] = kinds[0]
    return found


def at_aspect(aspect: str, init_args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model whose samples have an aspect, and whose prompts say so where they tell one at all.

    Raises:
        UserError: a model without a network.
    """
    if not isinstance(net := init_args.get("net"), dict):
        raise UserError(f"aspect={aspect}: the model has no network whose samples could have another shape")
    changed = {"class_path": "penstock.lightning_modules.nets.starflow.at_aspect"}
    found = init_args | {"net": changed | {"init_args": {"net": net, "aspect": aspect}}}
    text = init_args.get("text") or {}
    if (told := text.get("init_args", {})).get("aspect"):
        found["text"] = text | {"init_args": told | {"aspect": aspect}}
    return found


@contextmanager
def told_afterwards() -> Iterator[None]:
    """Keeps warnings until the block is over, when no bar stands in their way; each is told once, as one line."""
    with warnings.catch_warnings(record=True) as heard:
        try:
            yield
        finally:
            for line in dict.fromkeys(" ".join(str(one.message).split()) for one in heard):
                print(f"penstock: warning: {line}", file=sys.stderr)


def run_sample(words: list[str]) -> int:
    """Draws samples from a checkpoint with its averaged weights; exit code 0.

    Raises:
        UserError: an unknown word, a wrong type, n or steps below 1, a number that is not finite, no such label, a bad
            checkpoint, a model that has no such aspect, a folder that can't be written.
    """
    given = split("sample", words, OWN)
    path = Path(given["ckpt_path"])
    options = {key: typed(key, given[key], kind) for key, kind in OWN.items() if key in given}
    if "out" in options:
        check_no_file("sample", Path(options["out"]))
    asked = parse_steps(options["steps"]) if "steps" in options else None
    for key, default in (("n", 64), ("batch", 256)):
        if options.setdefault(key, default) < 1:
            raise UserError(f"{key}={options[key]}: expected a whole number of 1 or more")
    if not SEEDS[0] <= options.get("seed", 0) <= SEEDS[1]:
        raise UserError(f"seed={options['seed']}: out of range; expected {SEEDS[0]} to {SEEDS[1]}")

    import torch

    from penstock.lightning_modules.bellman import folder_of, sampling_grid
    from penstock.lightning_modules.build import config_of_checkpoint, model_from_checkpoint
    from penstock.lightning_modules.decoding_bar import decoding_bar
    from penstock.lightning_modules.gs_jacobi import read

    solver, inverse = options.get("solver"), options.get("inverse")
    changes = ({"solver": solver_config(solver)} if solver else {}) | (
        nest_init_args(read(Path(inverse))) if inverse else {}
    )
    change = partial(at_aspect, options["aspect"]) if "aspect" in options else dict
    try:
        model = model_from_checkpoint(path, change, **changes)
    except UserError as error:
        for word, given_as in (("solver", solver), ("inverse", inverse)):
            if given_as and re.search(rf"at model: option '{word}[.']", str(error)):
                name = config_of_checkpoint(path)["model"]["class_path"].rpartition(".")[2]
                raise UserError(f"{word}={given_as}: {name} has no {word} to choose") from error
        raise
    if not hasattr(model, "sample"):
        raise UserError(f"ckpt_path={path}: {type(model).__name__} does not generate samples")
    extra_kinds = _options(model)
    check_keys("sample", given, OWN | extra_kinds)
    extra = {key: typed(key, given[key], kind) for key, kind in extra_kinds.items() if key in given}
    for key, value in extra.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={given[key]}: expected a finite number")
    if "prompt" in extra and "labels" in options:
        raise UserError(f"prompt={extra['prompt']} and labels={options['labels']}: expected one of them")
    device = torch.device(usable_device(options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")))
    model = model.to(device).eval()
    cond = _labels(options.get("labels"), options["n"], model, device)
    generator = torch.Generator(device).manual_seed(options.get("seed", 0))

    steps = options.get("steps", str(getattr(model, "default_steps", 20)))
    steps = steps if isinstance(asked, Bellman) else int(steps)
    run = run_of_checkpoint(str(path))
    called = [f"sample_{steps}_steps", *([solver] if solver else []), *([Path(inverse).stem] if inverse else [])]
    called += [f"{key}_{given[key]}" for key in ("aspect", *extra, "labels", "seed") if key in given]
    out = Path(options.get("out") or (run or Path(".")) / "samples" / re.sub(r"[^-.\w]", "_", "_".join(called)))
    with made("sample", out), told_afterwards():
        if isinstance(asked, Bellman):
            sampling_grid(model, asked, extra.get("guidance"), folder_of(path))
        parts, start = [], time.perf_counter()
        with torch.inference_mode(), decoding_bar(model, options["n"], extra.get("frames")):
            for first in range(0, options["n"], options["batch"]):
                size = min(options["batch"], options["n"] - first)
                part = None if cond is None else cond[first : first + size]
                parts.append(model.sample(size, steps=steps, cond=part, generator=generator, **extra).cpu())
        seconds = time.perf_counter() - start
        report = {"n": options["n"], "steps": steps}
        report |= {word: options[word] for word in ("solver", "inverse", "aspect") if word in options}
        report |= extra | ({"labels": options["labels"]} if "labels" in options else {})
        report |= {"network_calls": model.nfe, "device": str(device), "seconds_per_sample": seconds / options["n"]}
        if traces := getattr(model, "traces", []):
            report |= {
                "calls_of_blocks": [t.calls for t in traces],
                "unfinished_chunks": sum(t.unfinished for t in traces),
            }
        report |= {"checkpoint": str(path), "seed": options.get("seed", 0)}
        with together("sample", out) as folder:
            write_samples(torch.cat(parts), cond, folder)
            (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    each = f"{model.nfe} network calls each, {1e3 * seconds / options['n']:.3g} ms a sample on {device}"
    print(f"{options['n']} sample{'' if options['n'] == 1 else 's'}, {each}")
    print(f"written: {out}")
    return 0


def _labels(text: str | None, n: int, model: Any, device: Any) -> Any:
    import torch

    classes = model.num_classes
    if not classes:
        if text is not None:
            raise UserError(f"labels={text}: the model is unconditional")
        return None
    try:
        labels = [int(part) for part in text.split(",")] if text else list(range(classes))
    except ValueError:
        raise UserError(f"labels={text}: expected whole numbers separated by commas, 0 to {classes - 1}") from None
    if bad := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"labels={text}: {bad[0]} is out of range; expected 0 to {classes - 1}")
    return torch.tensor(labels, device=device)[torch.arange(n, device=device) % len(labels)]


def write_samples(samples: Any, labels: Any, out: Path) -> None:
    """`samples.safetensors` (and labels), and `grid.png`; of videos also `grid.gif` (and `grid.mp4`)."""
    from safetensors.torch import save

    from penstock.lightning_modules.callbacks.samples import draw
    from penstock.lightning_modules.callbacks.video_samples import save_clips

    tensors = {"samples": samples.contiguous()} | ({} if labels is None else {"labels": labels.cpu()})
    (out / "samples.safetensors").write_bytes(save(tensors))
    cols = round(len(samples) ** 0.5)
    draw(samples.float(), cols, labels).save(out / "grid.png")
    if samples.ndim == 5:
        save_clips(samples, cols, out / "grid")
