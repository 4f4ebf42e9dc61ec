"""Pairs of noise and the samples that a flow made of it for a prompt."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.datamodules.base import Split
from penstock.datamodules.image_text import ImageText, Prompts
from penstock.datamodules.pairs import Pairs, PairStore
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.pairs import PairMaker
from penstock.lightning_modules.prompted_pairs import PromptedMaker


class PromptedPairs(Pairs):
    """`Pairs` with `text`: pair i was made for caption i of `real`, over and over, in all wordings.

    The key of the data is `image`, or `latent` for a flow in latent space. All arguments are those of `Pairs`.
    """

    real: ImageText

    def build(self) -> tuple[Any, dict[str, np.ndarray]]:
        if not isinstance(self.real, ImageText):
            raise UserError(f"data.real: found {type(self.real).__name__}, expected ImageText, which has the prompts")
        store, numbers = super().build()
        return (_Texted(store, self.real.texts) if isinstance(store, PairStore) else store), numbers

    def pair_maker(self, teacher: str, device: torch.device) -> PairMaker:
        """The teacher, asked for the captions of `real`."""
        return PromptedMaker(teacher, self.recipe, device, self.real.texts, self.real.fingerprint)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """As `Pairs`; `text` is added to what the teacher makes online."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch if "text" in batch else _texted(batch, self.real.texts)

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], Tensor | None]:
        """Prompts of real samples, see `ImageText.prompts`."""
        return self.real.prompts(n, split)


class _Texted:
    """A store of pairs whose labels are numbers of prompts."""

    def __init__(self, store: PairStore, texts: Prompts) -> None:
        self.store, self.texts = store, texts

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        return _texted(self.store.fetch(numbers), self.texts)

    def warm(self, numbers: np.ndarray) -> None:
        self.store.warm(numbers)


def _texted(batch: dict[str, Any], texts: Prompts) -> dict[str, Any]:
    return {**{k: v for k, v in batch.items() if k != "label"}, "text": texts(batch["label"])}
