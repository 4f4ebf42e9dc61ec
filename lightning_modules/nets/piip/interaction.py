"""How neighbouring branches of a pyramid exchange features: arXiv 2406.04330 eq. 1-4, gates of zero at first."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from penstock.lightning_modules.nets.piip.cross_attention import DeformableAttention, DenseAttention, Grid


class State(NamedTuple):
    """Of a branch: tokens of the patches `(B, H W, D)`, their grid (H, W), and its class token `(B, 1, D)` if any."""

    tokens: Tensor
    grid: Grid
    cls: Tensor | None = None


class ConvFfn(nn.Module):
    """Two layers with a depthwise 3x3 convolution between them.

    Args:
        dim: Of the tokens.
        ratio: Width inside, of `dim`.
    """

    def __init__(self, dim: int, ratio: float = 0.25):
        super().__init__()
        inside = int(dim * ratio)
        self.fc1 = nn.Linear(dim, inside)
        self.conv = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(inside, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens `(B, H W, dim)` of a grid (H, W)."""
        y = self.conv(self.fc1(x).transpose(1, 2).unflatten(2, grid))
        return self.fc2(self.act(y.flatten(2).transpose(1, 2)))


class Injector(nn.Module):
    """Adds to a branch what it reads in another, and a feed-forward layer, each by gates that start at zero.

    Args:
        dim: Of the branch.
        feat_dim: Of what it reads.
        attention: From one to the other.
        norm: Whether what goes into attention and feed-forward is normed.
        ffn_ratio: See `ConvFfn`.
        drop_path: Probability that an image skips the feed-forward layer in training.
    """

    def __init__(
        self,
        dim: int,
        feat_dim: int,
        attention: DeformableAttention | DenseAttention,
        norm: bool = True,
        ffn_ratio: float = 0.25,
        drop_path: float = 0.4,
    ):
        super().__init__()
        self.query_norm, self.feat_norm, self.ffn_norm = (
            nn.LayerNorm(width, eps=1e-6) if norm else nn.Identity() for width in (dim, feat_dim, dim)
        )
        self.attn, self.ffn, self.drop_path = attention, ConvFfn(dim, ffn_ratio), DropPath(drop_path)
        self.attn_gate, self.ffn_gate = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, own: Tensor, grid: Grid, feat: Tensor, feat_grid: Grid) -> Tensor:
        """Tokens `(B, H W, dim)`, of `own` and those `(B, H_f W_f, feat_dim)` that it reads."""
        own = own + self.attn_gate * self.attn(self.query_norm(own), grid, self.feat_norm(feat), feat_grid)
        return own + self.ffn_gate * self.drop_path(self.ffn(self.ffn_norm(own), grid))


class InteractionUnit(nn.Module):
    """Both directions between two branches, each from what the other was before.

    Args:
        coarse_dim: Of the branch of the smaller image.
        fine_dim: Of that of the larger one.
        attention: `deformable` or `dense`.
        heads: Of the attention.
        points: Of each head of a deformable one.
        value_ratio: See `DeformableAttention`.
        ffn_ratio: See `ConvFfn`.
        drop_path: See `Injector`.
        speed_up: Neither projections to the other's width nor norms, the authors' faster variant.
    """

    def __init__(
        self,
        coarse_dim: int,
        fine_dim: int,
        attention: Literal["deformable", "dense"] = "deformable",
        heads: int = 16,
        points: int = 4,
        value_ratio: float = 0.5,
        ffn_ratio: float = 0.25,
        drop_path: float = 0.4,
        speed_up: bool = False,
    ):
        super().__init__()

        def injector(dim: int, other: int) -> Injector:
            width = other if speed_up else dim
            deformable = attention == "deformable"
            attn = (
                DeformableAttention(dim, width, heads, points, value_ratio)
                if deformable
                else DenseAttention(dim, width, heads)
            )
            return Injector(dim, width, attn, not speed_up, ffn_ratio, drop_path)

        self.to_coarse = nn.Identity() if speed_up else nn.Linear(fine_dim, coarse_dim)
        self.to_fine = nn.Identity() if speed_up else nn.Linear(coarse_dim, fine_dim)
        self.coarse, self.fine = injector(coarse_dim, fine_dim), injector(fine_dim, coarse_dim)
        self.apply(initialize)

    def forward(self, coarse: State, fine: State) -> tuple[State, State]:
        """The states of both."""
        of_fine, of_coarse = self.to_coarse(fine.tokens), self.to_fine(coarse.tokens)
        return (
            coarse._replace(tokens=self.coarse(coarse.tokens, coarse.grid, of_fine, fine.grid)),
            fine._replace(tokens=self.fine(fine.tokens, fine.grid, of_coarse, coarse.grid)),
        )


class Interaction(nn.ModuleList):
    """Units between all neighbours, from the finest pair to the coarsest, each of what the one before gave.

    Args:
        units: Between branches i and i + 1, the coarsest first.
    """

    def __init__(self, units: Sequence[InteractionUnit]):
        super().__init__(units)

    def forward(self, states: Sequence[State]) -> list[State]:
        """The states of all branches, the coarsest first."""
        states = list(states)
        for i in reversed(range(len(self))):
            states[i], states[i + 1] = self[i](states[i], states[i + 1])
        return states


def initialize(module: nn.Module) -> None:
    """PIIP's start of new layers; for `module.apply`, which reaches an attention after its layers."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    elif isinstance(module, DeformableAttention):
        module.reset_parameters()
        return
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
