"""Blocks that recompute their activations."""

import pytest
import torch
from torch import nn

from penstock.lightning_modules.callbacks.perf import checkpoint_activations
from penstock.lightning_modules.errors import UserError


class Block(nn.Linear):
    pass


class Net(nn.Sequential):
    checkpoint_blocks = (Block,)

    def __init__(self):
        super().__init__(Block(4, 4), nn.Tanh(), Block(4, 4))


class Two(nn.Module):
    """A network, a second one beside it, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.net, self.denoiser, self.teacher = Net(), Net(), Net().requires_grad_(False)

    def forward(self, x):
        return (self.net(x) + self.denoiser(x) + self.teacher(x)).square().sum()


def test_all_networks_that_train_recompute_and_gradients_stay(monkeypatch):
    torch.manual_seed(0)
    plain, x = Two(), torch.randn(3, 4)
    again = Two()
    again.load_state_dict(plain.state_dict())
    checkpoint_activations(again)
    assert again.state_dict().keys() == plain.state_dict().keys()
    ran = []
    monkeypatch.setattr(nn.functional, "linear", _noted(nn.functional.linear, ran))
    plain(x).backward()
    counts = [len(ran)]
    again(x).backward()
    counts.append(len(ran) - counts[0])
    assert counts == [6, 10]  # four blocks twice, the frozen two once
    for one, other in zip(plain.parameters(), again.parameters()):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=0)


def _noted(linear, ran):
    def noting(*args):
        ran.append(args[0].shape)
        return linear(*args)

    return noting


def test_networks_without_blocks_are_refused():
    with pytest.raises(UserError, match="Linear names no checkpoint_blocks"):
        checkpoint_activations(nn.Linear(2, 2))
