"""Pairs of real data and the noise that a trained flow carries it back to."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penstock.datamodules.pairs import Pairs
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.pairs import PairMaker
from penstock.lightning_modules.real_pairs import InvertingMaker


class RealPairs(Pairs):
    """`Pairs` whose data is real: each training sample of `real` and the noise that the teacher encodes it to.

    For fine-tuning on real data (arXiv 2405.20320, configuration G). Arguments are those of `Pairs`; an `n` larger than
    the training split is all of it.
    """

    def pair_maker(self, teacher: str, device: torch.device) -> PairMaker:
        """The teacher, given the training samples of `real`."""
        if self.online:
            raise UserError("data.online: pairs of real data are the same in every epoch, expected false")
        view = self.real.view("train")
        self.recipe = replace(self.recipe, n=min(self.recipe.n, len(view)))

        def real(rows: Tensor) -> dict[str, Any]:
            return self.real.finished(view.fetch(rows.numpy()))

        maker = InvertingMaker(teacher, self.recipe, device, real, self.real.fingerprint)
        if maker.shape != self.shape:
            raise UserError(f"data.teacher: encodes samples {maker.shape}, expected {self.shape}, data.real's")
        return maker
