"""How near are clips that a model makes of others to what the data make of them?"""

import lightning.pytorch as pl
import torch
from torch import Tensor

from penstock.lightning_modules.callbacks.generation import Generated
from penstock.lightning_modules.callbacks.ranks import sum_over_ranks
from penstock.lightning_modules.callbacks.reference import Split, data_of
from penstock.lightning_modules.errors import UserError


class TranslationError:
    """A metric of `GenerationMetrics`: mean squared distance of samples from what the data make of the same sources.

    Logs `translation_mse/<nfe>`, and as `translation_mse/source` the same of the sources left as they are. It is a
    measure where the source and the caption say what comes out, as for edits.

    Args:
        split: of the data, that of the prompts.
    """

    def __init__(self, split: Split = "test"):
        self.split = split

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses data whose samples have no sources.

        Raises:
            UserError: so it is.
        """
        if not getattr(trainer.datamodule, "sourced", False):
            raise UserError(
                f"translation_mse: {type(trainer.datamodule).__name__} has no sources, expected data of pairs"
            )
        self._data = trainer.datamodule

    def reset(self, device: torch.device) -> None:
        """Forgets the samples."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, samples: Generated) -> None:
        """Adds a chunk."""
        numbers = self._data.view(self.split).numbers
        found = self._data.finished(self._data.store.fetch(numbers[samples.index.cpu().numpy() % len(numbers)]))
        real, source = (x.to(samples.data.device) for x in (data_of(found), found["source"]))
        self._sums += torch.stack([real.new_tensor(len(real)), _far(samples.data, real), _far(source, real)])

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """The mean over the samples."""
        count, *sums = sum_over_ranks(self._sums).tolist()
        self._means = [total / count for total in sums]
        return {"translation_mse": self._means[0]}

    def constants(self, trainer: pl.Trainer) -> dict[str, float]:
        """`translation_mse/source`."""
        return {"translation_mse/source": self._means[1]}


def _far(one: Tensor, other: Tensor) -> Tensor:
    """Sum over samples of the mean squared distance."""
    return (one - other).double().square().flatten(1).mean(1).sum()
