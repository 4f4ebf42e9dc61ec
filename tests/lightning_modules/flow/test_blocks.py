"""Blocks of a batch: all rows once, and the same ones whether a batch is cut as a whole or by ranks."""

import pytest

from penstock.lightning_modules.flow.blocks import Shares


def block_of(shares, size, first=0):
    """Block of each sample of a part of a batch, by its place in the batch."""
    order = shares.in_turn(size)
    assert sorted(order) == list(range(size))
    return {
        first + order[row]: name for name, rows in shares.rows(size).items() for row in range(rows.start, rows.stop)
    }


@pytest.mark.parametrize(
    ("shares", "size"),
    [(Shares(), 8), (Shares(0.5, 0.25, 0, 1, 0.25), 16), (Shares(2, 1, 0, 0, 0.3), 66), (Shares(1, 0, 0, 0, 0), 5)],
)
def test_ranks_cut_as_one(shares, size):
    whole = block_of(shares, 3 * size)
    assert len(whole) == 3 * size
    parts = {}
    for rank in range(3):
        parts |= block_of(shares, size, rank * size)
    assert parts == whole


def test_less_than_a_period_keeps_its_order():
    assert Shares(1, 0.3, 0.17, 0, 0.211).in_turn(7) == list(range(7))
