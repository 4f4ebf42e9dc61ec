"""Thresholds and ranges of anomaly scores, kept in the checkpoint of the model that they belong to."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError

Range = tuple[float, float]


class Calibration(nn.Module):
    """Says which scores and which values of maps are anomalous, and brings both to [0, 1].

    Scores at or above the threshold are anomalous. Normalised ones are `(x - threshold) / (max - min) + 0.5`, cut to
    [0, 1], so that the threshold lies at 0.5 (as anomalib's). NaN in a buffer is what was never set.

    Attributes:
        image_threshold: `()` float64.
        pixel_threshold: `()` float64.
        score_range: `(2,)` float64, smallest and largest score.
        map_range: `(2,)` float64, smallest and largest value of maps.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (
            ("image_threshold", ()),
            ("pixel_threshold", ()),
            ("score_range", (2,)),
            ("map_range", (2,)),
        ):
            self.register_buffer(name, torch.full(shape, math.nan, dtype=torch.float64))

    def set(
        self,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        score_range: Range | None = None,
        map_range: Range | None = None,
    ) -> None:
        """Sets all of them; None is unknown."""
        given = {"image_threshold": image_threshold, "pixel_threshold": pixel_threshold}
        given |= {"score_range": score_range, "map_range": map_range}
        for name, value in given.items():
            own = getattr(self, name)
            own.copy_(torch.as_tensor(math.nan if value is None else value, dtype=own.dtype).expand_as(own))

    def scores(self, scores: Tensor) -> Tensor:
        """Scores of images, any shape, in [0, 1].

        Raises:
            UserError: the threshold was never set.
        """
        return self._normalised(scores, "image_threshold", self.score_range)

    def maps(self, maps: Tensor) -> Tensor:
        """Anomaly maps, any shape, in [0, 1].

        Raises:
            UserError: the threshold was never set.
        """
        return self._normalised(maps, "pixel_threshold", self.map_range)

    def colours(self, maps: Tensor) -> Tensor:
        """Anomaly maps, any shape, in [0, 1] to be seen: as `maps` or, without a threshold, linear over their range.

        Raises:
            UserError: the range was never set.
        """
        if not self.pixel_threshold.isnan():
            return self.maps(maps)
        self.check("map_range")
        low, high = self.map_range.to(maps)
        return ((maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)).clamp(0, 1)

    def check(self, name: str) -> None:
        """Refuses what was never set.

        Args:
            name: of a buffer.

        Raises:
            UserError: it is NaN.
        """
        if bool(getattr(self, name).isnan().any()):
            raise UserError(
                f"calibration.{name}: never set, expected a model validated with callbacks=anomaly (AnomalyMetrics)"
                f"{' on images with masks' if name == 'pixel_threshold' else ''}"
            )

    def facts(self) -> dict[str, float | list[float]]:
        """What is known, as plain numbers."""
        return {name: value.tolist() for name, value in self.named_buffers() if not value.isnan().any()}

    def _normalised(self, x: Tensor, threshold: str, ends: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.check(threshold)
        low, high = ends.to(x)
        span = torch.where(high > low, high - low, torch.ones_like(low))
        return ((x - getattr(self, threshold).to(x)) / span + 0.5).clamp(0, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Calibration":
        """Moves with the model, but keeps float64 where the model's weights become half as long."""
        return super()._apply(lambda own: own.to(fn(own).device), recurse)
