"""`penstock plan experiment=... gpus=64`: memory, communication and time of training on many GPUs, nothing computed."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from penstock.lightning_modules.cli.compose import KEYS, OWN, compose
from penstock.lightning_modules.cli.conf import groups
from penstock.lightning_modules.cli.given import typed
from penstock.lightning_modules.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from penstock.lightning_modules.cli.plan_tree import PlannedRun, Row

CARDS = ("a100", "h100", "h200", "b200")
WORDS = ("gpus", "gpu", "batch", "checkpointing", "efficiency")
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
GIB = 2**30


def run_plan(words: list[str]) -> int:
    """Prints what training takes that the words of `fit` compose; exit code 0.

    Raises:
        UserError: an unknown word or value, or a training step that can't be run without numbers.
    """
    given, rest = split_words(words)
    card = _choice("gpu", given.get("gpu", "h100"), CARDS)
    counts = [_count("gpus", n) for n in given["gpus"].split(",")] if "gpus" in given else list(COUNTS)
    efficiency = typed("efficiency", given.get("efficiency", "0.5"), float)
    if not 0 < efficiency <= 1:
        raise UserError(f"efficiency={efficiency:g}: expected a share of the peak in (0, 1]")
    checkpointing = _choice("checkpointing", given.get("checkpointing", "asked"), ("true", "false", "asked"))
    if not rest:
        raise UserError("plan: nothing to plan; expected experiment=NAME (penstock list experiments)")
    tree, name = compose(rest)
    batch = given.get("batch", (tree["data"].get("init_args") or {}).get("batch_size"))
    if batch is None:
        raise UserError(f"plan: {name} sets no data.batch_size; expected batch=N, the samples of all GPUs in a step")
    batch = _count("batch", batch)

    from penstock.lightning_modules.cli.plan_tree import PlannedRun
    from penstock.lightning_modules.hardware import GPUS

    run = PlannedRun(tree, None if checkpointing == "asked" else checkpointing == "true")
    gpu = GPUS[card]
    rows = [run.row(gpu, n, batch, efficiency) for n in counts]
    print("\n".join(_facts(name, run)))
    if len(rows) == 1:
        print("\n".join(_memory(rows[0])))
    peak = (gpu.half if run.half else gpu.single) / 1e12
    print(f"\n{card}: {gpu.source}; kernels at {efficiency:.0%} of {peak:g} TFLOP/s")
    print("\n".join(_lines(_table(rows, gpu.memory))))
    if any(row.batch != batch for row in rows):
        print(f"batch: one sample a GPU where there are more GPUs than the {batch} samples of a step")
    return 0


def split_words(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The words of `plan` by key, and those that `fit` has.

    Raises:
        UserError: a word that neither has.
    """
    given, rest = {}, []
    for word in words:
        key, equals, value = word.partition("=")
        if key in WORDS and equals:
            given[key] = value
            continue
        known = [*WORDS, *groups(), *KEYS, *OWN]
        if (first := key.lstrip("+~").partition(".")[0]) not in known or (not equals and not word.startswith("~")):
            hint = did_you_mean(first, known)
            raise UserError(f"plan {word}: unknown{hint}; expected the words of fit, and {'=, '.join(WORDS)}=")
        rest.append(word)
    return given, rest


def _choice(key: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise UserError(f"{key}={value}: expected one of {', '.join(choices)}{did_you_mean(value, choices)}")
    return value


def _count(key: str, value: str | int) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"{key}={value}: expected a whole number of 1 or more")
    return int(value)


def _facts(name: str, run: "PlannedRun") -> Iterable[str]:
    cost, numbers = run.cost, sum(p.numel() for p in run.module.parameters())
    training = sum(p.numel() for p in run.module.parameters() if p.requires_grad)
    precision = "bfloat16" if run.half else "float32"
    yield f"{name}: {numbers:,} parameters, {training:,} of them train; {run.strategy}, matrix products in {precision}"
    flops, again = (line.each / 1e12 for line in (cost.flops, cost.again))
    yield f"a sample: {flops:.4g} TFLOP forward and backward, {again:.4g} to recompute blocks"
    less = "no blocks to recompute" if cost.checkpointed is None else f"{_size(cost.checkpointed)} with checkpointing"
    on = "on" if run.checkpointing else "off"
    yield f"activations: {_size(cost.activations)} without, {less} (here {on})"


def _size(line) -> str:
    return f"{line.each / GIB:.4g} GiB a sample + {line.fixed / GIB:.3g}"


def _memory(row: "Row") -> Iterable[str]:
    parts = {name: getattr(row.resident, name) for name in ("weights", "gradients", "optimizer", "ema", "gathered")}
    parts |= {"activations": row.activations, "all": row.memory}
    yield f"memory of a GPU, GiB, with {row.own} of {row.batch} samples:"
    yield "  " + ", ".join(f"{name} {value / GIB:.4g}" for name, value in parts.items())


def _table(rows: list["Row"], memory: float) -> list[tuple[str, ...]]:
    head = (
        "GPUs",
        "batch",
        "a GPU",
        "GiB",
        "fits",
        "sent, GB",
        "compute, s",
        "sending, s",
        "step, s",
        "samples/s",
        "MFU",
    )
    found = [head]
    for row in rows:
        time, fits = row.time, "yes" if row.memory < memory else "no"
        seconds = (f"{x:.4g}" for x in (time.compute, time.communication, time.step, row.batch / time.step))
        sizes = (f"{row.memory / GIB:.4g}", fits, f"{row.traffic.sent / 1e9:.4g}")
        found.append((str(row.gpus), str(row.batch), str(row.own), *sizes, *seconds, f"{time.mfu:.1%}"))
    return found


def _lines(table: list[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    for row in table:
        yield "  ".join(text.rjust(width) for text, width in zip(row, widths))
