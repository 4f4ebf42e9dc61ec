"""How different are the samples of one prompt? Mean pairwise LPIPS (arXiv 2512.05150, Table 9)."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from penstock.benchmarks.t2i.scorer import Scorer
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.premetrics import Distance
from penstock.lightning_modules.perceptual import LPIPS

SMALLEST = 32


class LPIPSDiversity(Scorer):
    """Mean over prompts of the mean LPIPS of all pairs of a prompt's samples; 0 where all are the same.

    The score is `lpips_diversity_<net>`. Which network the paper took is not published; AlexNet is what LPIPS is
    usually reported with.

    Args:
        net: Backbone of LPIPS.
        weights: Its weights, see `LPIPS`.
        device: Where it runs.
    """

    def __init__(
        self, net: Literal["alex", "vgg", "squeeze"] = "alex", weights: str | None = None, device: str = "cpu"
    ):
        self.distance, self.device = LPIPS(net, weights), device
        self.name = f"lpips_diversity_{net}"

    def missing(self) -> list[str]:
        try:
            self.distance.prepare()
        except UserError as error:
            return [str(error).removeprefix("LPIPS: ")]
        return []

    def measure(self, folder: Path) -> dict[str, float]:
        values = [pairwise(images.to(self.device), self.distance) for images in prompts_of(folder)]
        return {self.name: float(torch.stack(values).mean())}


@torch.no_grad()
def pairwise(images: Tensor, distance: Distance) -> Tensor:
    """Mean distance of the S (S - 1) / 2 pairs of images `(S, 3, H, W)` in [0, 1], a float64 number on the CPU.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"pairwise: {len(images)} images, expected at least 2")
    first, second = zip(*combinations(range(len(images)), 2))
    return distance(images[list(first)], images[list(second)]).double().mean().cpu()


def prompts_of(folder: Path) -> Iterator[Tensor]:
    """The samples `(S, 3, H, W)` in [0, 1] of each prompt, of GenEval's folders or of DPG-Bench's grids of 2x2.

    Raises:
        UserError: no pictures, one sample only, samples of different or too small size.
    """
    groups = sorted(path for path in folder.glob("*/samples") if path.is_dir())
    grids = sorted(folder.glob("*.png"))
    if not groups and not grids:
        raise UserError(f"{folder}: no pictures; expected 00000/samples/*.png, or grids <name>.png")
    for place in groups or grids:
        images = [_read(file) for file in sorted(place.glob("*.png"))] if groups else _quarters(_read(place))
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(images) < 2 or len(sizes) > 1 or min(min(sizes)) < SMALLEST:
            found = f"{len(images)} samples of {', '.join(f'{w} x {h}' for h, w in sorted(sizes)) or 'no size'}"
            raise UserError(f"{place}: {found}; expected two or more of one size, {SMALLEST} pixels or more a side")
        yield torch.stack(images)


def _quarters(grid: Tensor) -> list[Tensor]:
    return [part for row in grid.chunk(2, 1) for part in row.chunk(2, 2)]


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a whole picture") from error
