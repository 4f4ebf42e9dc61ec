"""Pairs with a real end: data and the noise that a flow carries it back to, or a source and what a flow makes of it.

The first are those of arXiv 2405.20320 section 4.3, configuration G; the second reflow a flow from data to data
(arXiv 2209.03003 section 2.1 with pi_0 a data set).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.pairs import PairMaker, Recipe


class InvertingMaker(PairMaker):
    """A teacher that encodes: pair i is real sample i at t = 1 and what the flow makes of it at t = 0.

    Args:
        teacher: Checkpoint of a flow.
        recipe: How; `n` is at most the number of real samples.
        device: Where the teacher runs.
        real: Real samples of rows `(b,)`, as evaluation sees them: a batch with the teacher's key, `label` if any.
        identity: What identifies `real`.

    Raises:
        UserError: as `PairMaker`; states on the way asked for.
    """

    def __init__(
        self,
        teacher: str | Path,
        recipe: Recipe,
        device: torch.device | str,
        real: Callable[[Tensor], dict[str, Any]],
        identity: str,
    ):
        super().__init__(teacher, recipe, device)
        if recipe.keep is not None:
            raise UserError("data.keep: pairs of real data keep both ends only, expected null")
        self.real, self.real_identity = real, identity

    def identity(self) -> dict[str, Any]:
        """What the pairs depend on, the real data among it."""
        return super().identity() | {"real": self.real_identity}

    @torch.no_grad()
    def make(self, index: Tensor, draws: Draws, label: Tensor | None = None) -> dict[str, Tensor]:
        """The pairs of real samples `index` `(b,)`; nothing is drawn. Rows past the last one repeat it."""
        recipe, model = self.recipe, self.model
        batch = self.real(index.cpu().clamp(max=recipe.n - 1))
        x1 = batch[self.key].to(model.device)
        cond = batch["label"].to(model.device) if model.num_classes else None
        options = {"cond": cond, "guidance": recipe.guidance, "solver": recipe.solver}
        source = model.integrate(x1, recipe.steps, reverse=True, **options).x
        return {"source": source, self.key: x1, **({} if cond is None else {"label": cond})}


class SourceMaker(PairMaker):
    """A teacher from data to data: pair i is source sample i at t = 0 and what the flow makes of it at t = 1.

    Args:
        teacher: Checkpoint of a flow trained on a `Pair` of data sets, or on pairs made of one.
        recipe: How; `n` is at most the number of source samples.
        device: Where the teacher runs.
        source: Source samples of rows `(b,)`, as evaluation sees them.
        identity: What identifies the source.

    Raises:
        UserError: as `PairMaker`; a flow that starts from noise.
    """

    source_is_data = True

    def __init__(
        self,
        teacher: str | Path,
        recipe: Recipe,
        device: torch.device | str,
        source: Callable[[Tensor], Tensor],
        identity: str,
    ):
        super().__init__(teacher, recipe, device)
        self.source, self.source_identity = source, identity

    def identity(self) -> dict[str, Any]:
        """What the pairs depend on, the source among it."""
        return super().identity() | {"source": self.source_identity}

    def start(self, index: Tensor, draws: Draws) -> Tensor:
        """Source samples `index` `(b,)`; nothing is drawn. Rows past the last one repeat it."""
        return self.source(index.cpu().clamp(max=self.recipe.n - 1)).to(self.model.device)
