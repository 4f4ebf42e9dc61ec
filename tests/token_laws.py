"""Laws of tokens for tests of inverses: cheap, causal, and with a memory like a cache of keys and values."""

import torch


class TokenLaws:
    """Mean and scale of token i follow from the tokens before it; what a call was told is remembered."""

    def __init__(self, batch, tokens, strength):
        generator = torch.Generator().manual_seed(0)
        self.weights = strength * torch.randn(2, tokens, tokens, generator=generator).double()
        self.memory, self.calls = torch.full((batch, tokens, 1), torch.nan).double(), []

    def __call__(self, before, start):
        end = start + before.shape[1]
        self.calls.append((start, end))
        self.memory[:, start:end], self.memory[:, end:] = before, torch.nan
        mean, scale = (weights[start:end, :end].tril(start) for weights in self.weights)
        return torch.tanh(mean @ self.memory[:, :end]), torch.exp(0.5 * torch.tanh(scale @ self.memory[:, :end]))
