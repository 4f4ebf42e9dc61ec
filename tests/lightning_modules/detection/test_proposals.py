"""Proposals to train on: torchvision's numbers of them, and the same ones for an image on any rank."""

import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from penstock.lightning_modules.detection import proposals
from penstock.lightning_modules.detection.proposals import SharedSampler, shares_of_ranks


def images(n=4):
    """Matches of many proposals, of a few, of none that is positive, of none at all."""
    draws = torch.Generator().manual_seed(0)
    found = [torch.randint(-1, 4, (size,), generator=draws) for size in (900, 30, 200, 400)]
    return [*found[:2], found[2].clamp(max=0), torch.full_like(found[3], -1)][:n]


def test_numbers_and_kinds_are_torchvisions():
    sampler, numbers = SharedSampler(64, 0.25), []
    for own, theirs in zip(sampler(images()), BalancedPositiveNegativeSampler(64, 0.25)(images())):
        assert [int(mask.sum()) for mask in own] == [int(mask.sum()) for mask in theirs]
        assert all(mask.dtype == torch.uint8 for mask in own)
        numbers.append(sum(int(mask.sum()) for mask in own))
    assert sampler.kept.tolist() == [sum(numbers), numbers[0]]
    assert shares_of_ranks([sampler]).tolist() == [[1, 1]]
    positives, negatives = sampler(images())
    for one, positive, negative in zip(images(), positives, negatives):
        assert (one[positive.bool()] > 0).all()
        assert (one[negative.bool()] == 0).all()


def test_draws_follow_the_global_generator():
    torch.manual_seed(3)
    first, second = SharedSampler(64, 0.25)(images(1)), SharedSampler(64, 0.25)(images(1))
    torch.manual_seed(3)
    again = SharedSampler(64, 0.25)(images(1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, second))


def test_an_image_has_its_draws_on_any_rank(monkeypatch):
    monkeypatch.setattr(proposals, "sum_over_ranks", lambda value: torch.tensor(5))
    whole = SharedSampler(64, 0.25)(images())
    for rank in (0, 1):
        monkeypatch.setattr(proposals, "rank_and_world", lambda rank=rank: (rank, 2))
        rows = slice(2 * rank, 2 * rank + 2)
        for found, expected in zip(SharedSampler(64, 0.25)(images()[rows]), whole):
            assert all(torch.equal(a, b) for a, b in zip(found, expected[rows]))
