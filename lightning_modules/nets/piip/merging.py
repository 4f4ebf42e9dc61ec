"""What becomes of the branches at the end: one map, a pyramid of maps, or classes."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.interaction import State, initialize

GROUPS = 32


def group_norm(dim: int) -> nn.GroupNorm:
    """Norm of 32 groups of channels.

    Raises:
        UserError: channels that they do not divide.
    """
    if dim % GROUPS:
        near = round(dim / GROUPS) * GROUPS or GROUPS
        raise UserError(f"branches: found {dim} channels to merge, expected a multiple of {GROUPS}, such as {near}")
    return nn.GroupNorm(GROUPS, dim)


class Permute(nn.Module):
    """Axes in another order.

    Args:
        dims: Of the axes.
    """

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def light_projection(dim: int, out: int) -> nn.Sequential:
    """Of classification: a layer between norms."""
    return nn.Sequential(
        group_norm(dim), Permute(0, 2, 3, 1), nn.Linear(dim, out), Permute(0, 3, 1, 2), group_norm(out)
    )


def conv_projection(dim: int, out: int) -> nn.Sequential:
    """Of dense tasks: two 3x3 convolutions."""
    return nn.Sequential(*(part for width in (dim, out) for part in conv_unit(width, out)))


def conv_unit(dim: int, out: int) -> nn.Sequential:
    """A 3x3 convolution with norm and ReLU."""
    return nn.Sequential(nn.Conv2d(dim, out, 3, padding=1, bias=False), group_norm(out), nn.ReLU())


def norm_unit(dim: int) -> nn.Sequential:
    """Norm and ReLU, of the first branch of a hybrid."""
    return nn.Sequential(group_norm(dim), nn.ReLU())


class Merge(nn.Module):
    """All branches as one map on the finest grid: a trained sum of projections, arXiv 2406.04330 eq. 5.

    The scalars have three axes of length 1: without axes they could not be sharded, and vectors have no weight decay,
    which these have.

    Args:
        projections: Of the branches' maps to one width, the coarsest first.
    """

    def __init__(self, projections: Sequence[nn.Module]):
        super().__init__()
        self.projections = nn.ModuleList(projections)
        self.weights = nn.ParameterList(torch.ones(1, 1, 1) for _ in projections)
        self.apply(initialize)

    def forward(self, states: Sequence[State]) -> Tensor:
        """`(B, D, H, W)`; maps are enlarged in float32 at least."""
        finest = states[-1].grid
        total = 0
        for state, projection, weight in zip(states, self.projections, self.weights):
            x = projection(state.tokens.transpose(1, 2).unflatten(2, state.grid))
            if state.grid != finest:
                wide = x.to(torch.promote_types(x.dtype, torch.float32))
                x = F.interpolate(wide, size=finest, mode="bilinear", align_corners=False).to(x.dtype)
            total = total + weight * x
        return total


def light_merge(dims: Sequence[int]) -> Merge:
    """Of classification: the first branch is only normed.

    Args:
        dims: Channels of the branches, the coarsest first.
    """
    return Merge([group_norm(dims[0]), *(light_projection(dim, dims[0]) for dim in dims[1:])])


def conv_merge(dims: Sequence[int]) -> Merge:
    """Of dense tasks.

    Args:
        dims: Channels of the branches, the coarsest first.
    """
    return Merge([conv_projection(dim, dims[0]) for dim in dims])


def hybrid_merge(dims: Sequence[int]) -> Merge:
    """Of one map of a hybrid: the first branch is only normed.

    Args:
        dims: Channels of the branches there, the coarsest first.
    """
    return Merge([norm_unit(dims[0]), *(conv_unit(dim, dims[0]) for dim in dims[1:])])


class Resampling(nn.Module):
    """Four maps of stride 16 at strides 4, 8, 16 and 32 (arXiv 2203.16527).

    Args:
        quarter: Channels of the first.
        eighth: Of the second.
    """

    def __init__(self, quarter: int, eighth: int):
        super().__init__()

        def double(dim: int) -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(dim, dim, 2, 2)

        self.quarter = nn.Sequential(double(quarter), group_norm(quarter), nn.GELU(), double(quarter))
        self.eighth = double(eighth)
        self.last = nn.MaxPool2d(2, 2)
        self.apply(initialize)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps `(B, D_l, H_l, W_l)`, the finest first, of `(B, D_l, H, W)`."""
        return [self.quarter(maps[0]), self.eighth(maps[1]), maps[2], self.last(maps[3])]


class SimpleFpn(Resampling):
    """Maps of strides 4, 8, 16 and 32 of one of stride 16.

    Args:
        dim: Of all maps.
        maps: 4, or 3 without the finest.
    """

    def __init__(self, dim: int, maps: Literal[3, 4] = 4):
        super().__init__(dim, dim)
        if maps == 3:
            self.quarter = None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps `(B, dim, H_l, W_l)`, the finest first, of `(B, dim, H, W)`."""
        found = [self.eighth(x), x, self.last(x)]
        return found if self.quarter is None else [self.quarter(x), *found]


class MergedHead(nn.Module):
    """Classes of the merged map's mean.

    Args:
        dims: Channels of the branches, the coarsest first.
        num_classes: K.
    """

    def __init__(self, dims: Sequence[int], num_classes: int):
        super().__init__()
        self.merge = light_merge(dims)
        self.norm, self.head = nn.LayerNorm(dims[0], eps=1e-6), nn.Linear(dims[0], num_classes)
        self.head.apply(initialize)

    def forward(self, states: Sequence[State]) -> Tensor:
        """Logits `(B, K)`."""
        tokens = self.merge(states).flatten(2).transpose(1, 2)
        return self.head(self.norm(tokens).mean(1))


Token = Literal["class", "first_patch"]


def mean_of_heads(branches: Sequence[nn.Module], states: Sequence[State], token: Token = "class") -> Tensor:
    """Logits `(B, K)`: the mean of what the branches' own classifiers give.

    Args:
        branches: With `norm` and `head`.
        states: Of them.
        token: What is classified; `first_patch`, the upper left one, is what the authors' released models read.
    """
    read = [state.tokens[:, 0] if token == "first_patch" else state.cls[:, 0] for state in states]
    return torch.stack([branch.head(branch.norm(x)) for branch, x in zip(branches, read)]).mean(0)
