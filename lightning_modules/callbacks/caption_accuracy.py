"""Do samples show what their captions say? The data's own judge tells."""

from typing import Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor

from penstock.lightning_modules.callbacks.generation import Generated
from penstock.lightning_modules.callbacks.ranks import gather
from penstock.lightning_modules.callbacks.reference import Split, data_of
from penstock.lightning_modules.errors import UserError


class Judge(Protocol):
    """Compares samples with captions."""

    def __call__(self, data: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """Shares `(b,)` in [0, 1] of what each caption says that its sample shows, by kind; `""` is all of it."""
        ...


class CaptionAccuracy:
    """A metric of `GenerationMetrics`: share of what the captions say that the samples show.

    Logs `caption_accuracy/<nfe>` and `caption_accuracy_<kind>/<nfe>` for each kind that the judge tells apart, and, as
    `/real`, the same for real samples with their own captions: what the judge itself makes of perfect ones.
    """

    def __init__(self, judge: Judge, split: Split = "test", n_real: int = 200):
        """Names the judge.

        Args:
            judge: `DigitReader` for moving digits.
            split: of the real samples.
            n_real: how many of these.

        Raises:
            UserError: `n_real` below 1.
        """
        if n_real < 1:
            raise UserError(f"n_real: {n_real} samples given, expected at least 1")
        self.judge, self.split, self.n_real = judge, split, n_real
        self._real: dict[str, float] | None = None

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses models and data without captions.

        Raises:
            UserError: the module takes no text, or the data has no prompts.
        """
        if not getattr(pl_module, "takes_text", False):
            raise UserError(f"caption_accuracy: {type(pl_module).__name__} takes no text, expected a model of captions")
        if not hasattr(trainer.datamodule, "prompts"):
            raise UserError(f"caption_accuracy: {type(trainer.datamodule).__name__} has no captions to ask for")

    def reset(self, device: torch.device) -> None:
        """Forgets the samples."""
        self._shares = _Shares()

    def update(self, samples: Generated) -> None:
        """Judges a chunk."""
        self._shares.add(self.judge(samples.data, samples.text))

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """The mean shares."""
        return self._shares.means()

    def constants(self, trainer: pl.Trainer) -> dict[str, float]:
        """`caption_accuracy/real` and the like, measured once."""
        if self._real is None:
            shares, rest = _Shares(), -(-self.n_real // trainer.world_size)
            for batch in trainer.datamodule.reference_dataloader(self.split):
                data, text = data_of(batch)[:rest], batch["text"][:rest]
                if len(text):
                    shares.add(self.judge(data, text))
                rest -= len(text)
                if rest <= 0:
                    break
            self._real = shares.means()
        return {f"{name}/real": value for name, value in self._real.items()}


class _Shares:
    """Sums of shares by kind."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}

    def add(self, shares: dict[str, Tensor]) -> None:
        self.count += len(next(iter(shares.values())))
        for kind, share in shares.items():
            self.sums[kind] = self.sums.get(kind, 0.0) + float(share.sum())

    def means(self) -> dict[str, float]:
        """Of all ranks, on rank 0."""
        parts = gather((self.count, self.sums))
        if parts is None:
            return {}
        count = sum(part[0] for part in parts)
        kinds = next((sums for _, sums in parts if sums), {})
        means = {kind: sum(sums.get(kind, 0.0) for _, sums in parts) / count for kind in kinds}
        return {f"caption_accuracy_{kind}".rstrip("_"): value for kind, value in means.items()}
