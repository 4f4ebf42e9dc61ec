"""TARFlow (arXiv 2412.06329), STARFlow's ancestor: pixels, learned places, equal blocks."""

import torch
from torch import Tensor, nn

from penstock.lightning_modules.nets.autoregressive import AutoregressiveBlock, Grid
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow, check_shape
from penstock.lightning_modules.nets.starflow import plain


class TARFlowBlock(AutoregressiveBlock):
    """A block with a learned vector for every place and, added to all tokens, one for every class.

    Args:
        channels: Numbers of a token.
        dim: Width of the transformer.
        depth: Its layers.
        places: Tokens.
        flipped: Whether tokens come in reverse order.
        num_classes: 0 is none; a label that is dropped (-1) is the mean of all.
        head_dim: Features of a head.
        volume_preserving: Whether only means are predicted.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        depth: int,
        places: int,
        flipped: bool,
        num_classes: int = 0,
        head_dim: int = 64,
        volume_preserving: bool = False,
    ):
        scale = "one" if volume_preserving else "exp"
        super().__init__(channels, dim, depth, None, 0, scale, 0.0, False, False, layer=plain(head_dim))
        self.flipped = flipped
        self.pos_embed = nn.Parameter(torch.randn(places, dim) * 1e-2)
        self.class_embed = nn.Parameter(torch.randn(num_classes, 1, dim) * 1e-2) if num_classes else None

    def embed(self, x: Tensor, start: int, cond: Tensor | None) -> Tensor:
        """Tokens `(B, n, C)` from a place on; `cond` are labels `(B,)`, -1 or None where they are dropped."""
        places = self.pos_embed.flip(0) if self.flipped else self.pos_embed
        x = super().embed(x, start, None) + places[start : start + x.shape[1]]
        if self.class_embed is None:
            return x
        dropped = self.class_embed.mean(0)
        if cond is None:
            return x + dropped
        return x + torch.where((cond < 0)[:, None, None], dropped, self.class_embed[cond.clamp(min=0)])


class TARFlow(AutoregressiveFlow):
    """Blocks of equal depth on the patches of an image; its patches have the channel slowest.

    Args:
        shape: (C, H, W).
        patch: Side of a patch.
        dim: Width.
        blocks: Number of blocks; 0, 2, ... read forwards.
        depth: Layers of each.
        num_classes: 0 is none.
        head_dim: Features of a head.
        volume_preserving: Whether only means are predicted; then the prior's variances are learned.

    Attributes:
        var: Variances of the prior `(places, C patch^2)`, 1 unless `volume_preserving`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (3, 64, 64),
        patch: int = 2,
        dim: int = 768,
        blocks: int = 8,
        depth: int = 8,
        num_classes: int = 0,
        head_dim: int = 64,
        volume_preserving: bool = False,
    ):
        channels, height, width = check_shape(shape, patch)
        places, size = (height // patch) * (width // patch), channels * patch**2
        parts = [
            TARFlowBlock(size, dim, depth, places, i % 2 == 1, num_classes, head_dim, volume_preserving)
            for i in range(blocks)
        ]
        super().__init__(parts, shape, patch, "R2L")
        self.num_classes = num_classes
        self.register_buffer("var", torch.ones(places, size))

    def guided(self, block: int) -> bool:
        """Whether there are classes, or a temperature can make another law."""
        return True

    def condition(self, cond: Tensor | None, batch: int) -> Tensor | None:
        """Labels `(B,)`; None is -1 for all, where there are classes."""
        if cond is not None or not self.num_classes:
            return cond
        return torch.full((batch,), -1, device=self.var.device)

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """Labels `(B,)` with -1 where `mask` `(B,)` is true."""
        return torch.where(mask, -1, cond)

    def tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """See `AutoregressiveFlow.tokens`; a token is (channel, row, column) of a patch, column fastest."""
        found, grid = super().tokens(x)
        return found.unflatten(-1, (self.patch**2, -1)).mT.flatten(-2), grid

    def untokens(self, tokens: Tensor, grid: Grid, video: bool) -> Tensor:
        """The inverse of `tokens`."""
        return super().untokens(tokens.unflatten(-1, (-1, self.patch**2)).mT.flatten(-2), grid, video)

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        """Moves the prior's variances a tenth of the way to the mean of `z^2` over the batch `(B, C, H, W)`."""
        tokens, _ = self.tokens(z)
        self.var.lerp_(tokens[:, 0].square().mean(0), 0.1)

    def prior(self, noise: Tensor) -> Tensor:
        """Unit noise `(B, C, H, W)` with the prior's variances."""
        tokens, grid = self.tokens(noise)
        return self.untokens(tokens * self.var.sqrt(), grid, False)


def tarflow_afhq(num_classes: int = 3) -> TARFlow:
    """TARFlow for AFHQ at 256 px (arXiv 2412.06329): patches of 8, width 768, 8 blocks of 8 layers."""
    return TARFlow((3, 256, 256), 8, 768, 8, 8, num_classes)


def tarflow_imagenet64(num_classes: int = 1000) -> TARFlow:
    """TARFlow for ImageNet at 64 px (arXiv 2412.06329), or with 0 classes the unconditional one."""
    return TARFlow((3, 64, 64), 2, 768, 8, 8, num_classes)


def tarflow_imagenet128(num_classes: int = 1000) -> TARFlow:
    """TARFlow for ImageNet at 128 px (arXiv 2412.06329): patches of 4, width 1024."""
    return TARFlow((3, 128, 128), 4, 1024, 8, 8, num_classes)
