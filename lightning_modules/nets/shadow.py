"""A second set of weights for a network to run with: a moving average, or those at the start."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Shadow(nn.Module):
    """Copies of the weights of `net` that train; frozen ones and buffers are shared, so a low-rank net costs little.

    Args:
        net: in its final form: parameters must not come or go afterwards.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self._names = [name for name, weight in net.named_parameters() if weight.requires_grad]
        for name, weight in zip(self._names, self._weights(net)):
            self.register_buffer(name.replace(".", "/"), weight.detach().clone())

    @torch.no_grad()
    def reset(self, net: nn.Module) -> None:
        """Takes the weights of `net` as they are."""
        torch._foreach_copy_(self._own(), self._weights(net))

    @torch.no_grad()
    def update(self, net: nn.Module, decay: Tensor | float) -> None:
        """`s <- decay s + (1 - decay) w`, with `decay` a number or a scalar tensor."""
        torch._foreach_lerp_(self._own(), self._weights(net), 1 - decay)

    @contextmanager
    def shown(self, net: nn.Module) -> Iterator[None]:
        """Inside, `net` has these weights: for calls that are `flow.twinflow.untracked`."""
        weights, own = self._weights(net), self._own()
        hidden = [weight.data for weight in weights]
        try:
            for weight, shadow in zip(weights, own):
                weight.data = shadow
            yield
        finally:
            for weight, data in zip(weights, hidden):
                weight.data = data

    def _weights(self, net: nn.Module) -> list[Tensor]:
        return [net.get_parameter(name) for name in self._names]

    def _own(self) -> list[Tensor]:
        return [self.get_buffer(name.replace(".", "/")) for name in self._names]
