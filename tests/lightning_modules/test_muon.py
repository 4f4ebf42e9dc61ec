"""Muon against torch's own, AdamW for the rest, and states that survive a checkpoint."""

import copy

import pytest
import torch
from torch import nn

from penstock.lightning_modules.muon import Muon, orthogonal


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 64), nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 3)
    )


def train(net, optimizer, steps, first=0):
    for k in range(first, first + steps):
        x = torch.randn(128, 4, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad()
        (net(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (256, 64)])
def test_singular_values_come_near_one_and_the_vectors_stay(shape):
    g = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=g), full_matrices=False)
    x = u * torch.rand(min(shape), generator=g).mul(0.95).add(0.05) @ v
    found = u.mT @ orthogonal(x[None])[0] @ v.mT
    values = found.diagonal()
    assert 0.6 < values.min() < values.max() < 1.25
    assert (found - values.diag()).abs().max() < 1e-3


def test_matrices_move_as_torch_has_it_and_the_rest_as_adamw_has_it():
    mine, theirs = network(), network()
    options = {"lr": 3e-3, "weight_decay": 0.1}
    matrices = [p for p in theirs.parameters() if p.ndim == 2 and min(p.shape) >= 48]
    rest = [p for p in theirs.parameters() if not any(p is m for m in matrices)]
    assert len(matrices) == 2
    other = torch.optim.Muon(matrices, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw", **options)
    adamw, muon = torch.optim.AdamW(rest, betas=(0.9, 0.95), **options), Muon(mine.parameters(), **options)
    before = copy.deepcopy(list(mine.parameters()))
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        for own, their in zip(mine.parameters(), theirs.parameters(), strict=True):
            own.grad = torch.randn(own.shape, generator=g)
            their.grad = own.grad.clone()
        grads = [p.grad for p in mine.parameters()]
        for one in (muon, other, adamw):
            one.step()
        assert all(p.grad is grad for p, grad in zip(mine.parameters(), grads, strict=True))
    for own, their, start in zip(mine.parameters(), theirs.parameters(), before, strict=True):
        if any(their is m for m in matrices):
            assert (own - their).norm() < 0.05 * (own - start).norm(), "theirs is in bfloat16"
        else:
            assert torch.equal(own, their)


def test_a_loaded_state_goes_on_to_the_same_bits():
    whole = network()
    train(whole, Muon(whole.parameters()), 6)
    net = network()
    optimizer = Muon(net.parameters())
    train(net, optimizer, 3)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = network()
    again.load_state_dict(weights)
    optimizer = Muon(again.parameters())
    optimizer.load_state_dict(state)
    train(again, optimizer, 3, first=3)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


def test_it_learns_and_takes_a_closure():
    net = network()
    optimizer = Muon(net.parameters(), lr=1e-2)
    x = torch.randn(128, 4)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        return loss.detach()

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


def test_what_has_no_gradient_stays():
    net = network()
    before = copy.deepcopy(net.state_dict())
    Muon(net.parameters(), lr=1.0).step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"iterations": 0}, {"least": 0}])
def test_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        Muon(network().parameters(), **options)
