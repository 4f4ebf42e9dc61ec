"""Cutting a batch into consecutive blocks, as TwinFlow's code does (arXiv 2512.05150)."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from fractions import Fraction
from math import lcm


def block_sizes(batch: int, shares: Sequence[float]) -> list[int]:
    """Rows of each block: `round(batch p / sum(p))`, half to even; the last takes what is left, the batch's end cuts.

    Args:
        batch: Number of rows.
        shares: Of the blocks, not negative, at least one positive.
    """
    total = sum(shares)
    sizes = [round(batch * share / total) for share in shares[:-1]]
    sizes.append(max(0, batch - sum(sizes)))
    left = batch
    for i, size in enumerate(sizes):
        sizes[i] = min(size, left)
        left -= sizes[i]
    return sizes


@dataclass(frozen=True)
class Shares:
    """Relative sizes of the blocks of a batch, in their order in it; 0 leaves one out.

    Args:
        e2e: From noise to data in one step, the rows that are rectified.
        mul: Short steps.
        any: Steps of any length.
        one: From any time to the data.
        adv: The network's own samples.

    Raises:
        ValueError: a negative share, or none that is positive.
    """

    e2e: float = 1.0
    mul: float = 1.0
    any: float = 1.0
    one: float = 0.0
    adv: float = 1.0

    def __post_init__(self):
        if min(astuple(self)) < 0 or sum(astuple(self)) == 0:
            raise ValueError(f"shares {astuple(self)}: expected numbers of 0 or more, at least one above")

    @property
    def number(self) -> int:
        """Blocks that are not left out."""
        return sum(share > 0 for share in astuple(self))

    def in_turn(self, batch: int) -> list[int]:
        """Row numbers of a batch in another order, by which the blocks of `rows` take turns in it.

        Each period, the fewest rows that the shares divide without rest, fills the blocks by its own; a batch of less
        than one keeps its order. Parts of a batch that hold whole periods, as ranks' may, are cut as the whole is.
        """
        whole = [Fraction(share).limit_denominator(1000) for share in astuple(self)]
        parts = [share / sum(whole) for share in whole]
        period = lcm(*(part.denominator for part in parts))
        if period > batch:
            return list(range(batch))
        block = [number for number, part in enumerate(parts) for _ in range(int(part * period))]
        return sorted(range(batch), key=lambda row: block[row % period])

    def rows(self, batch: int) -> dict[str, slice]:
        """Rows of each block in a batch, in order; one that is left out has none."""
        names = [f.name for f in fields(self)]
        present = [name for name in names if getattr(self, name) > 0]
        sizes = dict(zip(present, block_sizes(batch, [getattr(self, name) for name in present])))
        found, start = {}, 0
        for name in names:
            found[name] = slice(start, start + sizes.get(name, 0))
            start = found[name].stop
        return found
