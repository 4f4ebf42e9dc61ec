"""Fréchet distance and its companions between generated and real features."""

from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from penstock.lightning_modules.callbacks.distances import (
    GaussianSums,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from penstock.lightning_modules.callbacks.features import FeatureExtractor, row_numbers
from penstock.lightning_modules.callbacks.generation import Generated
from penstock.lightning_modules.callbacks.ranks import gather_rows
from penstock.lightning_modules.callbacks.reference import Reference, Split, real_data, reference


class FrechetDistance:
    """A metric of `GenerationMetrics`: Fréchet distance of Gaussians fitted to the features (arXiv 1706.08500, eq. 6).

    On request from the same features: the kernel distance (arXiv 1801.01401) and improved precision and recall
    (arXiv 1904.06991), against at most 10,000 real samples. Names follow the features: `fd_pixels`, `kid_pixels`, and
    `fid`, `kid` only with `Inception`. Clips take features of `clip_features`: `fd_frames_pixels` of all their frames,
    `fd_clip_pixels`, `fvd_r3d_18`, and `fvd` only with `I3D`.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        also: list[Literal["kid", "precision", "recall"]] | None = None,
        split: Split = "train",
    ):
        """Names features and companions.

        Args:
            features: on which the distance is measured.
            also: further metrics on the same features.
            split: of the real data to compare with.
        """
        self.features, self.also, self.split = features, also or [], split
        self._reference: Reference | None = None
        self._collected = False

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the feature network, so that a missing file stops the run before it trains, and so do no real data."""
        real_data(trainer)
        self.features.prepare(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Forgets the samples."""
        self.features.prepare(device)
        self._sums = GaussianSums()
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._device = device

    def update(self, samples: Generated) -> None:
        """Adds a chunk's features."""
        features = samples.features(self.features)
        self._sums.update(features)
        if self.also:
            self._rows.append((row_numbers(samples.index, features).cpu(), features.cpu()))

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """The distances on rank 0."""
        if not self._collected:
            self._reference, self._collected = reference(trainer, self.features, self.split), True
        sums = self._sums.over_ranks(self._device)
        rows = gather_rows(*self._own_rows()) if self.also else None
        if self._reference is None:
            return {}
        name = self.features.metric
        moments = (*sums.moments(), *self._reference.sums.moments())
        if self._device.type == "cuda":
            moments = [moment.to(self._device) for moment in moments]
        values = {name("fd"): frechet_distance(*moments)}
        if "kid" in self.also:
            values[name("kid")] = kernel_distance(self._reference.features, rows[1])
        if "precision" in self.also or "recall" in self.also:
            both = dict(zip(("precision", "recall"), precision_recall(self._reference.features, rows[1])))
            values |= {name(kind): value for kind, value in both.items() if kind in self.also}
        return values

    def constants(self, trainer: pl.Trainer) -> dict[str, float]:
        """None."""
        return {}

    def _own_rows(self) -> tuple[Tensor, Tensor | None]:
        if not self._rows:
            return torch.empty(0, dtype=torch.int64), None
        return tuple(torch.cat(column) for column in zip(*self._rows))
