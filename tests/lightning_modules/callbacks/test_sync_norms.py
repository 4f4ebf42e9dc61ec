"""Batch norms over two gloo ranks of unequal shares against torch's own on the whole batch, in fp64."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import running
from timm.layers import BatchNormAct2d
from torch import nn

from penstock.lightning_modules.callbacks.sync_norms import SyncNorms

SHARES = (slice(0, 3), slice(3, 5))


def kinds():
    """By name: a norm and how many axes its input has beside samples and channels."""
    return {
        "plain": (nn.BatchNorm2d(4), 2),
        "rows": (nn.BatchNorm1d(4), 0),
        "cumulative": (nn.BatchNorm2d(4, momentum=None), 2),
        "without weights": (nn.BatchNorm2d(4, affine=False), 2),
        "no statistics": (nn.BatchNorm2d(4, track_running_stats=False), 2),
        "timm's": (BatchNormAct2d(4), 2),
    }


def passed(norm, axes, rows):
    """Outputs of two calls in training and one in evaluation for `rows` of the batch, gradients, the norm's state."""
    draws = torch.Generator().manual_seed(0)
    found, gradients = [], []
    for training in (True, True, False):
        norm.train(training)
        whole = [torch.randn(5, 4, *[3] * axes, generator=draws, dtype=torch.float64) for _ in range(2)]
        x, aim = 3 * whole[0][rows] + 2, whole[1][rows]
        x = (x.contiguous(memory_format=torch.channels_last) if axes == 2 else x).requires_grad_()
        y = norm(x)
        (y * aim).sum().backward()
        found.append(y.detach())
        gradients.append(x.grad)
    own = [torch.zeros(0) if p.grad is None else p.grad for p in norm.parameters()]
    return {"found": found, "gradients": gradients, "own": own, "state": dict(norm.state_dict())}


def prepared(norm):
    """In double precision, with weights other than at the start."""
    norm = norm.double()
    for k, weight in enumerate(norm.parameters()):
        nn.init.constant_(weight, 0.7 - k)
    return norm


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("norms")
    with running(Path(__file__), folder):
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", list(kinds()))
def test_two_ranks_are_one(kind, by_rank):
    norm, axes = kinds()[kind]
    one, two = passed(prepared(norm), axes, slice(None)), [found[kind] for found in by_rank]
    close = {"rtol": 1e-10, "atol": 1e-10}
    if kind == "no statistics":  # a batch of evaluation has its own
        for part in ("found", "gradients"):
            del one[part][2]
    for part in ("found", "gradients"):
        for call, expected in enumerate(one[part]):
            torch.testing.assert_close(torch.cat([found[part][call] for found in two]), expected, **close)
    if kind != "no statistics":
        for weight, expected in enumerate(one["own"]):
            torch.testing.assert_close(sum(found["own"][weight] for found in two), expected, **close)
    for found in two:
        torch.testing.assert_close(found["state"], one["state"], **close)


def test_one_rank_keeps_torchs_own():
    net = nn.Sequential(nn.BatchNorm2d(4))
    SyncNorms().setup(SimpleNamespace(world_size=1), net, "fit")
    assert "forward" not in vars(net[0])


def test_a_copy_has_its_own_statistics():
    net = nn.Sequential(nn.BatchNorm2d(4))
    for _ in range(2):
        SyncNorms().setup(SimpleNamespace(world_size=2), net, "fit")
    other = copy.deepcopy(net)
    other(torch.randn(3, 4, 5, 5))
    assert other[0].num_batches_tracked == 1
    assert net[0].num_batches_tracked == 0


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for kind, (norm, axes) in kinds().items():
        net = nn.Sequential(prepared(norm))
        SyncNorms().setup(SimpleNamespace(world_size=2), net, "fit")
        found[kind] = passed(net[0], axes, SHARES[rank])
    torch.save(found, Path(sys.argv[1], f"{rank}.pt"))
    dist.destroy_process_group()
