"""Pairs of real data and the noise that a flow carries it back to (arXiv 2405.20320 section 4.3, configuration G)."""

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
