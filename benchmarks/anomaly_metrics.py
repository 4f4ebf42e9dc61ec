"""Metrics of all pixels of a large test set: memory and time of counts by score against keeping every pixel.

`python -m penstock.benchmarks.anomaly_metrics`: synthetic anomaly maps like FastFlow's, the mean of three scales of
`-exp(-m)` upsampled to `--size`; seven images in ten have one to three regions of defects, of another strength in each
scale. In `all strong` the scales agree, so that defects come near 0 and fill many binades: harder on memory. Each row
is a process of its own: its peak memory is all of it, and its seconds are without the making of maps.
"""

import resource
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn.functional import interpolate
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

from penstock.benchmarks.report import parser, write
from penstock.lightning_modules.callbacks.score_counts import ScoreCounts

STRIDES = (4, 8, 16)
GIB = 1 << 30


def maps(images: int, size: int, seed: int, alike: bool) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """Anomaly maps `(size, size)` in [-1, 0) and masks of their defects."""
    grid = torch.arange(size) / size
    for number in range(images):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        mask = torch.zeros(size, size, dtype=torch.bool)
        if number % 10 < 7:
            for _ in range(1 + int(torch.randint(3, (), generator=generator))):
                y, x, height, width = torch.rand(4, generator=generator).tolist()
                height, width = 0.02 + 0.12 * height, 0.02 + 0.12 * width
                mask |= ((grid[:, None] - y) / height) ** 2 + ((grid - x) / width) ** 2 < 1
        strengths = (0.3 * 100 ** torch.rand(len(STRIDES), generator=generator)).tolist()
        total = torch.zeros(size, size)
        for stride, strength in zip(STRIDES, strengths[:1] * len(STRIDES) if alike else strengths):
            shape = (1, 1, size // stride, size // stride)
            square = 0.5 * (1 + 0.5 * torch.randn(shape, generator=generator)) ** 2
            defect = interpolate(mask[None, None].float(), shape[2:], mode="area")
            total += interpolate(-torch.exp(-square - strength * defect), (size, size), mode="bilinear")[0, 0]
        yield (total / len(STRIDES)).numpy(), mask.numpy()


def measure(how: str, images: int, size: int, seed: int, alike: bool) -> dict[str, Any]:
    """One row: `counts`, `scikit-learn` or `torchmetrics`; `alike` is whether all scales have one strength."""
    torch.set_num_threads(1)
    before = peak()
    counts, areas = ScoreCounts(), [BinaryAUROC(), BinaryAveragePrecision()]
    kept: list[tuple[NDArray, NDArray]] = []
    adding = 0.0
    for scores, mask in maps(images, size, seed, alike):
        start = perf_counter()
        if how == "counts":
            counts.update_map(scores, mask)
        elif how == "scikit-learn":
            kept.append((scores.ravel(), mask.ravel()))
        else:
            for area in areas:
                area.update(torch.from_numpy(scores) + 1, torch.from_numpy(mask).long())
        adding += perf_counter() - start
    start, aupro, f1 = perf_counter(), None, None
    if how == "counts":
        found = counts.measure()
        auroc, ap, aupro, f1 = found.auroc, found.ap, found.aupro, found.f1_max
    elif how == "scikit-learn":
        flat, truth = (np.concatenate(column) for column in zip(*kept))
        auroc, ap = float(roc_auc_score(truth, flat)), float(average_precision_score(truth, flat))
    else:
        auroc, ap = (float(area.compute()) for area in areas)
    return {
        "how": how,
        "maps": "all strong" if alike else "",
        "images": images,
        "pixels": images * size * size,
        "binades": len(counts.pages) or None,
        "ms/image": 1000 * adding / images,
        "s at the end": perf_counter() - start,
        "peak GiB": peak() / GIB,
        "GiB before": before / GIB,
        "pixel AUROC": auroc,
        "pixel AP": ap,
        "F1-max": f1,
        "AUPRO": aupro,
    }


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `anomaly_metrics.json` and `anomaly_metrics.md`."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=5000)
    options.add_argument("--strong", type=int, default=1000, help="images of the row of strong defects")
    options.add_argument("--kept", type=int, default=20, help="images of the rows that keep every pixel")
    options.add_argument("--size", type=int, default=1024, help="side of the maps, a multiple of 16")
    given = options.parse_args(argv)
    rows = []
    for how, images, alike in (
        ("counts", given.kept, False),
        ("scikit-learn", given.kept, False),
        ("torchmetrics", given.kept, False),
        ("counts", given.images, False),
        ("counts", given.strong, True),
    ):
        with get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (how, images, given.size, given.seed, alike)))
        print(rows[-1], flush=True)
    differences = {
        f"{name}, {row['how']}": abs(row[name] - rows[0][name])
        for row in rows[1:3]
        for name in ("pixel AUROC", "pixel AP")
    }
    values = {"target": "5,000 images of 1024 px within 2 GiB", "size": given.size, "differences": differences}
    title = f"Metrics of all pixels of maps of {given.size} px"
    write("anomaly_metrics", values, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
