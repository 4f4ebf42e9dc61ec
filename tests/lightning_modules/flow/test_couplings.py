"""Couplings: exact plans against brute force and the assignment problem, Sinkhorn marginals and seeds."""

from itertools import permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from penstock.lightning_modules.flow.couplings import Independent, MinibatchOT


def batch(n, shape=(3,), seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=gen), torch.randn(n, *shape, generator=gen) + 0.5


def cost(x0, x1):
    return torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square()


def test_exact_plan_is_the_best_of_all_permutations():
    x0, x1 = batch(6)
    paired, same, index = MinibatchOT().pair(x0, x1)
    best = min(sum(cost(x0, x1)[p[j], j].item() for j in range(6)) for p in permutations(range(6)))
    assert (paired - x1).square().sum().item() == pytest.approx(best, rel=1e-5)
    assert torch.equal(paired, x0[index])
    assert same is x1


@pytest.mark.parametrize(("n", "shape"), [(1, (2,)), (37, (2,)), (128, (3, 4, 4))])
def test_exact_plan_equals_linear_sum_assignment(n, shape):
    x0, x1 = batch(n, shape)
    _, _, index = MinibatchOT().pair(x0, x1)
    _, expected = linear_sum_assignment(cost(x0, x1).T.numpy())
    assert index.tolist() == expected.tolist()
    assert sorted(index.tolist()) == list(range(n))


def test_one_dimensional_plan_is_monotone():
    x0, x1 = batch(64, (1,))
    paired, _, _ = MinibatchOT().pair(x0, x1)
    assert torch.equal(paired[:, 0].argsort(), x1[:, 0].argsort())


def test_duplicates_still_give_a_permutation():
    x = torch.ones(16, 2)
    _, _, index = MinibatchOT().pair(x, x)
    assert sorted(index.tolist()) == list(range(16))


def test_sinkhorn_interpolates_between_exact_and_independent():
    x0, x1 = batch(24, (2,))
    exact = (MinibatchOT().pair(x0, x1)[0] - x1).square().sum(1).mean()
    means = []
    for reg in (0.05, 0.3, 50.0):
        gen = torch.Generator().manual_seed(3)
        draws = [MinibatchOT(reg).pair(x0, x1, gen)[0] for _ in range(12)]
        means.append(torch.stack([(d - x1).square().sum(1).mean() for d in draws]).mean())
    assert exact.item() <= means[0] <= 1.35 * exact.item()
    assert means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(cost(x0, x1).mean().item(), rel=0.1)


def test_sinkhorn_draws_every_source_equally_often():
    x0, x1 = batch(8, (2,))
    gen = torch.Generator().manual_seed(0)
    counts = sum(MinibatchOT(0.3).pair(x0, x1, gen)[2].bincount(minlength=8) for _ in range(200)) / 200
    torch.testing.assert_close(counts, torch.ones(8), rtol=0, atol=0.3)


def test_sinkhorn_is_reproducible():
    x0, x1 = batch(16)
    first, second = (MinibatchOT(0.1).pair(x0, x1, torch.Generator().manual_seed(5))[2] for _ in range(2))
    other = MinibatchOT(0.1).pair(x0, x1, torch.Generator().manual_seed(6))[2]
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_independent_changes_nothing():
    x0, x1 = batch(5)
    a, b, index = Independent().pair(x0, x1)
    assert a is x0
    assert b is x1
    assert index.tolist() == [0, 1, 2, 3, 4]


def test_empty_batch():
    empty = torch.zeros(0, 2)
    assert MinibatchOT().pair(empty, empty)[2].shape == (0,)


def test_errors():
    with pytest.raises(ValueError, match="one shape"):
        MinibatchOT().pair(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="reg"):
        MinibatchOT(reg=0.0)
