"""FastFlow on magnetic tiles: which features, norm, augmentation, score and smoothing, chosen on one half of the test.

`python -m penstock.benchmarks.fastflow_ablation --data D --weights W --threads 1` trains every variant for 20 epochs
with `experiment=fastflow_magnetic_tile data.val=half`, whose validation images are a fixed half of the test images of
every kind. The rule: the largest mean of image and pixel AUROC on that half. The other half is only looked at. Runs are
kept in `--work`: the same command goes on where it was stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from penstock.benchmarks.launch import kept
from penstock.benchmarks.report import parser, write
from penstock.datamodules.anomaly import Anomaly
from penstock.lightning_modules.build import build, config_of_checkpoint, model_from_checkpoint
from penstock.lightning_modules.callbacks.score_counts import ScoreCounts
from penstock.lightning_modules.flow.anomaly_map import anomaly_map, blurred, image_score

PLAIN = ["experiment=fastflow_magnetic_tile", "net=fastflow_mobilenetv2_tf", "data.val=half", "logger=csv"]
PLAIN += ["model.net.norm=sample", "model.net.norm_affine=true", "model.net.backbone.layers=[1,2,3]"]
PLAIN += ["model.top=0", "model.blur=0"]
CHANNEL, ONE = ["model.net.norm=channel"], "model.net.backbone.layers=[3]"
VARIANTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "public": ({"strides": "4 8 16", "norm": "sample, affine"}, []),
    "no_affine": ({"strides": "4 8 16", "norm": "sample"}, ["model.net.norm_affine=false"]),
    "channel": ({"strides": "4 8 16", "norm": "channel"}, CHANNEL),
    "channel_8_16": ({"strides": "8 16", "norm": "channel"}, [*CHANNEL, "model.net.backbone.layers=[2,3]"]),
    "sample_16": (
        {"strides": "16", "norm": "sample"},
        ["model.net.norm_affine=false", "model.net.backbone.layers=[3]"],
    ),
    "channel_16": ({"strides": "16", "norm": "channel"}, [*CHANNEL, "model.net.backbone.layers=[3]"]),
    "channel_16_flip": (
        {"strides": "16", "norm": "channel", "augmentation": "flip"},
        [*CHANNEL, ONE, "data.flip=true", "model.cache_features=false"],
    ),
    "channel_16_32": ({"strides": "16 32", "norm": "channel"}, [*CHANNEL, "model.net.backbone.layers=[3,4]"]),
}
READOUTS = [(top, blur) for blur in (0.0, 4.0, 8.0) for top in (0.0, 0.01, 0.03)]
HALVES = {"choice": "val", "check": "test"}


@torch.no_grad()
def raw_maps(model: LightningModule, data: Anomaly, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Anomaly maps `(n, 1, H, W)` without smoothing, labels `(n,)` and masks `(n, 1, H, W)` of a split."""
    columns = []
    for batch in data.reference_dataloader(split):
        z = [z for z, _ in model.net(batch["image"])]
        columns.append((anomaly_map(z, tuple(batch["image"].shape[-2:])), batch["label"], batch["mask"]))
    return tuple(torch.cat(column) for column in zip(*columns))


def measured(maps: Tensor, labels: Tensor, masks: Tensor, top: float) -> dict[str, float]:
    """AUROC of images and of pixels."""
    images, pixels = ScoreCounts(), ScoreCounts()
    images.update(image_score(maps, top).numpy(), (labels > 0).numpy())
    pixels.update(maps.flatten().numpy(), (masks > 0).flatten().numpy())
    return {"image_auroc": images.measure().auroc, "pixel_auroc": pixels.measure().auroc}


def rows_of(facts: dict[str, str], run: Path) -> list[dict[str, Any]]:
    """A row for each way to read the maps of a trained model."""
    checkpoint = run / "checkpoints" / "last.ckpt"
    model = model_from_checkpoint(checkpoint)
    (data,) = build(config_of_checkpoint(checkpoint), "data")
    data.setup()
    found = {half: raw_maps(model, data, split) for half, split in HALVES.items()}
    found["all"] = tuple(torch.cat(column) for column in zip(*found.values()))
    rows = []
    for top, blur in READOUTS:
        row = {"strides": "", "norm": "", "augmentation": "", **facts, "top": top, "blur": blur}
        for part, (maps, labels, masks) in found.items():
            values = measured(blurred(maps, blur), labels, masks, top)
            row |= {f"{name} {part}": value for name, value in values.items()}
        rows.append(row)
    return rows


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that the rule takes."""
    return max(rows, key=lambda row: np.mean([row["image_auroc choice"], row["pixel_auroc choice"]]))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `fastflow_ablation` in the results folder."""
    options = parser(__doc__)
    options.add_argument("--data", required=True, help="folder magnetic_tile, which holds the category tile")
    options.add_argument("--weights", required=True, help="MobileNetV2's weights, converted from TensorFlow")
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    options.add_argument("--work", type=Path, default=Path("runs/fastflow_ablation"))
    args = options.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    words = [f"data.data_dir={Path(args.data).resolve()}", f"seed_everything={args.seed}"]
    words += [f"model.net.backbone.weights={Path(args.weights).resolve()}", f"trainer.max_epochs={args.epochs}"]
    words += [f"trainer.check_val_every_n_epoch={args.epochs}"]
    rows = []
    for name in args.variants:
        facts, own = VARIANTS[name]
        kept([*PLAIN, *words, *own], args.work / name, args.threads)
        rows += rows_of(facts, args.work / name)
        print(name, flush=True)
    best = chosen(rows)
    shown = [{**row, "chosen": "x" if row is best else ""} for row in rows]
    write(
        "fastflow_ablation",
        {"epochs": args.epochs, "chosen": best},
        shown,
        title=f"FastFlow on magnetic tiles, MobileNetV2, 256 px, batch 32, {args.epochs} epochs, last epoch",
        seed=args.seed,
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
