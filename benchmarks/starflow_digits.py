"""STARFlow on digits: bits a dimension of the held-out third, beside Gaussians and an equal split of the same layers.

`python -m penstock.benchmarks.starflow_digits --seeds 0 1 2 --threads 1` trains `starflow_digits` as it is (shallow
blocks and a deep one) and with its layers shared out equally, all else alike, and fits Gaussians in closed form to the
same images. Runs are kept in `--work`: the same command goes on where it was stopped.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from penstock.benchmarks.gaussian_laws import chosen_share, class_nats, fit, fit_classes
from penstock.benchmarks.launch import COST, kept
from penstock.benchmarks.report import parser, write
from penstock.datamodules.digits import Digits
from penstock.lightning_modules.build import build, config_of_checkpoint, model_from_checkpoint

DEQUANTISED = 1 / 12
SHARES = [k / 20 for k in range(1, 21)]
BITS = "bits_per_dim"


def levels(data: Digits, split: str) -> tuple[Tensor, Tensor]:
    """Grey levels `(n, 64)`, float64, and classes `(n,)` of a split."""
    batches = list(data.reference_dataloader(split))
    image = torch.cat([batch["image"] for batch in batches]).flatten(1).double()
    return ((image + 1) / 2 * (data.levels - 1)).round(), torch.cat([batch["label"] for batch in batches])


def gaussians(data: Digits) -> dict[str, float]:
    """Bits a dimension of the held-out images, in the mean over dequantisation.

    The covariance is that of the levels and the 1/12 level^2 of dequantisation, which alone makes it invertible: there
    is no further ridge. Covariances of classes lean to their mean by what cross-validation on training images chooses.
    """
    (x, label), (held, asked) = levels(data, "train"), levels(data, "test")
    share = chosen_share(x, label, DEQUANTISED, SHARES)
    laws = fit_classes(x, label, DEQUANTISED, share)
    nats = {
        "Gaussian, full covariance": fit(x, DEQUANTISED).nats(held, DEQUANTISED),
        f"Gaussian of each class, {share:g} of its covariance common": class_nats(laws, held, asked, DEQUANTISED),
    }
    return {name: float(value.mean()) / (x.shape[1] * math.log(2)) for name, value in nats.items()}


def shared_out(depths: Sequence[int]) -> list[int]:
    """As many blocks with as many layers in all, the first ones one layer deeper where they do not divide.

    `[1, 1, 1, 5]` gives `[2, 2, 2, 2]`.
    """
    each, more = divmod(sum(depths), len(depths))
    return [each + (k < more) for k in range(len(depths))]


def trained(name: str, words: list[str], given: Any) -> tuple[list[dict[str, float]], Path]:
    """What runs of one split measured, by seed, and a checkpoint of one of them."""
    found = []
    for seed in given.seeds:
        run = given.work.resolve() / f"{name}_seed{seed}"
        kept(["experiment=starflow_digits", f"seed_everything={seed}", *words, *given.word], run, given.threads)
        metrics = json.loads((run / "metrics.json").read_text())
        cost = json.loads((run / COST).read_text()) if (run / COST).is_file() else {}
        found.append({k: v for k, v in metrics.items() if "/" in k or k in (BITS, "train_seconds")} | cost)
    return found, run / "checkpoints" / "last.ckpt"


def row(name: str, found: list[dict[str, float]], best: list[dict[str, float]], checkpoint: Path) -> dict[str, Any]:
    """A row of the table: means over seeds, with standard deviations."""
    scores = {k: k for k in sorted(found[0]) if k.startswith(("fd_", "label_accuracy/")) and k[-1].isdigit()}
    more = [each[BITS] - other[BITS] for each, other in zip(found, best)]
    used = [each["cpu_seconds"] for each in found if "cpu_seconds" in each]
    return {
        "law": name,
        "bits a dimension": spread([each[BITS] for each in found]),
        "more than the first, by seed": spread(more) if found is not best else None,
        **{key: spread([each[key] for each in found]) for key in scores},
        "parameters": sum(weight.numel() for weight in model_from_checkpoint(checkpoint).net.parameters()),
        "CPU, s": round(fmean(used)) if used else None,
        "seeds": len(found),
    }


def spread(values: Sequence[float]) -> str:
    """The mean with three decimals, and the standard deviation over seeds where there are several."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, fits and writes `starflow_digits.json` and `.md`."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", help="--seed by default")
    options.add_argument("--work", type=Path, default=Path("runs/starflow_digits"), help="folder that keeps the runs")
    options.add_argument("--word", action="append", default=[], help="a further word for penstock fit")
    given = options.parse_args(argv)
    given.seeds = given.seeds or [given.seed]
    if given.threads:
        torch.set_num_threads(given.threads)
    best, checkpoint = trained("deep_shallow", [], given)
    config = config_of_checkpoint(checkpoint)
    depths = config["model"]["init_args"]["net"]["init_args"]["depths"]
    equal = shared_out(depths)
    rivals, other = trained("equal", [f"model.net.depths={equal}".replace(" ", "")], given)
    rows = [row(f"STARFlow, layers {depths}", best, best, checkpoint), row(f"layers {equal}", rivals, best, other)]
    (data,) = build(config, "data")
    data.prepare_data()
    data.setup()
    closed = gaussians(data)
    rows += [dict.fromkeys(rows[0]) | {"law": k, "bits a dimension": f"{v:.3f}"} for k, v in closed.items()]
    values = {"runs": {"deep_shallow": best, "equal": rivals}, "gaussians": closed}
    title = "Digits, dequantised: bits a dimension of the held-out third"
    write("starflow_digits", values, rows, title=title, seed=given.seeds[0], out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
