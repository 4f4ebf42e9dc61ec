"""Thresholds and ranges of anomaly scores, kept in the checkpoint of the model that they belong to."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError

Range = tuple[float, float]


class Calibration(nn.Module):
    """Says which scores and which values of maps are anomalous, and brings both to [0, 1].

    Scores at or above the threshold are anomalous. Normalised ones are `(x - threshold) / (max - min) + 0.5`, cut to
    [0, 1], so that the threshold lies at 0.5 (as anomalib's). NaN in a buffer is what was never set.

    Args:
        settings: What scores and maps depend on beside the weights, each by its key. The values at which thresholds
            were set are kept with them.

    Attributes:
        measured: float64, the settings' values at which thresholds were set, one after the other.
        image_threshold: `()` float64.
        pixel_threshold: `()` float64.
        score_range: `(2,)` float64, smallest and largest score.
        map_range: `(2,)` float64, smallest and largest value of maps.
    """

    def __init__(self, settings: Mapping[str, Sequence[float]] | None = None) -> None:
        super().__init__()
        self.settings = {key: list(map(float, values)) for key, values in (settings or {}).items()}
        self.register_buffer("measured", torch.full((len(self._values()),), math.nan, dtype=torch.float64))
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
        self.measured.copy_(torch.tensor(self._values(), dtype=self.measured.dtype))

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
                f"{' on images with masks' if name == 'pixel_threshold' else ''}; train with validations, as by "
                "trainer.check_val_every_n_epoch=1, or calibrate it: penstock validate ckpt_path=FILE"
            )

    def changed(self) -> str | None:
        """The first setting whose value is another than that at which thresholds were set, in words."""
        measured = self.measured.tolist()
        for key, values in self.settings.items():
            then, measured = measured[: len(values)], measured[len(values) :]
            if then != values and not any(map(math.isnan, then)):
                return f"{key}: found {_words(values)}, but the checkpoint's thresholds were set with {_words(then)}"
        return None

    def check_settings(self) -> None:
        """Refuses thresholds of other settings.

        Raises:
            UserError: one changed.
        """
        if words := self.changed():
            raise UserError(f"{words}; leave it, or calibrate it anew: penstock validate ckpt_path=FILE with this word")

    def _values(self) -> list[float]:
        return [value for values in self.settings.values() for value in values]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes checkpoints that say nothing of settings."""
        state_dict.setdefault(f"{prefix}measured", torch.full_like(self.measured, math.nan))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def facts(self) -> dict[str, float | list[float]]:
        """What is known, as plain numbers."""
        known = {name: value for name, value in self.named_buffers() if name != "measured"}
        return {name: value.tolist() for name, value in known.items() if not value.isnan().any()}

    def _normalised(self, x: Tensor, threshold: str, ends: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.check(threshold)
        low, high = ends.to(x)
        span = torch.where(high > low, high - low, torch.ones_like(low))
        return ((x - getattr(self, threshold).to(x)) / span + 0.5).clamp(0, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Calibration":
        """Moves with the model, but keeps float64 where the model's weights become half as long."""
        return super()._apply(lambda own: own.to(fn(own).device), recurse)


def _words(values: list[float]) -> str:
    found = [f"{value:g}" for value in values]
    return found[0] if len(found) == 1 else f"[{', '.join(found)}]"
