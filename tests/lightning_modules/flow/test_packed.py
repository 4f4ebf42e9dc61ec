"""Rows in 4 bits a number: their inner products, their memory, and costs from them."""

import pytest
import torch

from penstock.lightning_modules.flow import bellman
from penstock.lightning_modules.flow.bellman import cost_matrix, gram, path_cost, schedules
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.packed import PackedRows


def packed(rows):
    kept = PackedRows(*rows.shape)
    for i, row in enumerate(rows):
        kept[i] = row
    return kept


@pytest.mark.parametrize("columns", [1, 511, 512, 100_000])
@pytest.mark.parametrize("size", [1e-12, 1, 1e12])
def test_inner_products(columns, size):
    torch.manual_seed(0)
    common = torch.randn(columns)
    rows = size * torch.stack([common, common + 0.01 * torch.randn(columns), -common, torch.randn(columns)])
    found, exact = packed(rows).gram(), gram(rows)
    norms = exact.diagonal().sqrt()
    torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=1e-5, atol=0)
    assert float(((found - exact) / (norms * norms[:, None])).abs().max()) < 1.5 / columns**0.5


def test_an_eighth_of_the_memory():
    kept = PackedRows(10, 512 * 100)
    stored = sum(t.untyped_storage().nbytes() for t in (kept.codes, kept.scales, kept.squares))
    assert stored < 1.05 * 10 * 512 * 100 * 4 / 8


def test_rounding_has_no_bias_and_repeats():
    row = torch.full((512 * 400,), 0.3)
    row[::512] = 7
    other = torch.ones_like(row)
    (_, found), _ = packed(torch.stack([row, other])).gram()
    assert float(found) == pytest.approx(float(row.double().sum()), rel=5e-3)
    rows = torch.randn(3, 5000)
    assert torch.equal(packed(rows).gram(), packed(rows).gram())


def test_zero_stays_zero_and_what_is_not_finite_is_seen():
    rows = torch.randn(3, 1000)
    rows[1] = 0
    found = packed(rows).gram()
    assert bool((found[1] == 0).all())
    for bad in (float("nan"), float("inf")):
        rows[1, 7] = bad
        assert not packed(rows).gram()[1].isfinite().any()


def test_costs_of_many_dimensions(monkeypatch):
    """Where the differences take too much, costs stay within a percent and the schedules are as good."""
    torch.manual_seed(0)
    x, mix = torch.randn(64, 3, 16, 16), torch.randn(3, 3)

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        return torch.einsum("ij,bjhw->bihw", mix, x).tanh() * torch.cos(4 * t) + x.flip(2) * t**3

    exact = cost_matrix(velocity, x, uniform(40))
    monkeypatch.setattr(bellman, "EXACT", 0)
    found = cost_matrix(velocity, x, uniform(40))
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)
    best = schedules(exact)
    for k in (2, 4, 6, 8):
        assert path_cost(exact, schedules(found).path(k)) <= 1.001 * best.cost(k)
    assert bool((cost_matrix(lambda x, t: x.new_ones(x.shape), x, uniform(10)) == 0).all())
