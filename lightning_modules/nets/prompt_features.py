"""Features of prompts in one tensor `(B, L, E)`, where a network wants a pooled vector or a mask besides the tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F


def with_pooled(tokens: Tensor, pooled: Tensor) -> Tensor:
    """The pooled features as a token in front: `(B, L, J)` and `(B, P)` to `(B, 1 + L, max(J, P))`, padded with 0."""
    width = max(tokens.shape[-1], pooled.shape[-1])
    padded = [F.pad(part, (0, width - part.shape[-1])) for part in (pooled[:, None].to(tokens), tokens)]
    return torch.cat(padded, dim=1)


def split_pooled(cond: Tensor, tokens: int, pooled: int) -> tuple[Tensor, Tensor]:
    """Tokens `(B, L, tokens)` and pooled features `(B, pooled)` of what `with_pooled` made."""
    return cond[:, 1:, :tokens], cond[:, 0, :pooled]


def with_mask(tokens: Tensor, mask: Tensor) -> Tensor:
    """The mask as a last feature, 1 at a token and 0 at padding: `(B, L, J)` and `(B, L)` to `(B, L, J + 1)`."""
    return torch.cat([tokens, (mask != 0).to(tokens)[..., None]], dim=-1)


def split_mask(cond: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `(B, L, J)` and mask bool `(B, L)` of what `with_mask` made."""
    return cond[..., :-1], cond[..., -1] > 0.5
