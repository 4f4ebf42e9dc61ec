"""Pairs with a real end: data and the noise it came from, or a source data set and what a flow makes of it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penstock.datamodules.pair import Pair
from penstock.datamodules.pairs import Pairs
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.pairs import PairMaker
from penstock.lightning_modules.real_pairs import InvertingMaker, SourceMaker


class RealPairs(Pairs):
    """`Pairs` whose data is real: each training sample of `real` and the noise that the teacher encodes it to.

    For fine-tuning on real data (arXiv 2405.20320, configuration G). Arguments are those of `Pairs`; an `n` larger than
    the training split is all of it.
    """

    def pair_maker(self, teacher: str, device: torch.device) -> PairMaker:
        """The teacher, given the training samples of `real`."""
        view = self.real.view("train")
        _limit(self, len(view))

        def real(rows: Tensor) -> dict[str, Any]:
            return self.real.finished(view.fetch(rows.numpy()))

        maker = InvertingMaker(teacher, self.recipe, device, real, self.real.fingerprint)
        if maker.shape != self.shape:
            raise UserError(f"data.teacher: encodes samples {maker.shape}, expected {self.shape}, data.real's")
        return maker


class SourcePairs(Pairs):
    """`Pairs` of a flow from data to data: each training sample of `real`'s source and what the teacher makes of it.

    For the reflow of translations (arXiv 2209.03003 section 2.1). `real` is a `Pair`, whose target is what metrics
    compare with. Arguments are those of `Pairs`; an `n` larger than the source's training split is all of it.
    """

    real: Pair

    def pair_maker(self, teacher: str, device: torch.device) -> PairMaker:
        """The teacher, given the training samples of the source."""
        if not isinstance(self.real, Pair):
            raise UserError(f"data.real: found {type(self.real).__name__}, expected Pair, which has a source")
        view = self.real.source.view("train")
        _limit(self, len(view))

        def source(rows: Tensor) -> Tensor:
            return self.real.sources(view, rows.numpy())

        maker = SourceMaker(teacher, self.recipe, device, source, self.real.source.fingerprint)
        if maker.shape != self.shape:
            raise UserError(f"data.teacher: makes samples {maker.shape}, expected {self.shape}, data.real's")
        return maker

    def starts(self, n: int) -> Tensor:
        """See `Pair.starts`."""
        return self.real.starts(n)


def _limit(data: Pairs, size: int) -> None:
    """Makes at most `size` pairs, and none online."""
    if data.online:
        raise UserError("data.online: pairs of real data are the same in every epoch, expected false")
    data.recipe = replace(data.recipe, n=min(data.recipe.n, size))
