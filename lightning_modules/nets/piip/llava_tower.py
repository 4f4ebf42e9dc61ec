"""The eyes of PIIP-LLaVA (arXiv 2501.07783): a pyramid of two branches that are not merged, and its projector."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.piip.clip import ClipBranch
from penstock.lightning_modules.nets.piip.convnext import ConvNextBranch
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.pyramid import Branch, Pyramid, Unit

BASE, LARGE = "vit_base_patch16_clip_quickgelu_224.openai", "vit_large_patch14_clip_quickgelu_{}.openai"
CONVNEXTS = {"B": "convnext_base.clip_laiona_augreg_320", "L": "convnext_large_mlp.clip_laion2b_ft_320"}
PRESETS: dict[str, tuple[str, int, int, int, int]] = {  # finer branch, its size, the size and pretraining of CLIP-L
    "clip_bl_512_256": ("", 512, 256, 224, 2),
    "convnext_b_clip_l_640_224": ("B", 640, 224, 224, 2),
    "clip_bl_512_448": ("", 512, 448, 336, 12),
    "convnext_b_clip_l_1024_336": ("B", 1024, 336, 336, 12),
    "convnext_l_clip_l_1024_336": ("L", 1024, 336, 336, 12),
}
PUBLISHED = dict(zip(PRESETS, (193.0, 191.0, 422.0, 598.0, 1037.0)))
"""1e9 operations of the towers without the projector, as the authors give them."""


class LlavaTower(nn.Module):
    """Images to the maps of two branches, each of its own grid and width.

    Args:
        branches: See `Pyramid`, two.
        unit: Likewise.
        name: Of the preset it is, for messages and published costs.

    Attributes:
        dims: Channels of the two maps, the coarser branch's first.
        image_size: Side of its images, pixels.
        tokens: Number of visual tokens of an image, the cells of the finer branch.

    Raises:
        UserError: as `Pyramid`, or another number of branches.
    """

    def __init__(self, branches: Sequence[Branch], unit: Unit | None = InteractionUnit, name: str = ""):
        super().__init__()
        if len(branches) != 2:
            raise UserError(f"branches: found {len(branches)}, expected 2")
        self.pyramid, self.name = Pyramid(branches, unit), name
        self.dims = [branch.dims[-1] for branch in branches]
        self.image_size = branches[-1].size
        self.tokens = (self.image_size // branches[-1].strides[-1]) ** 2

    def load(self) -> None:
        """Pretrained weights of the branches.

        Raises:
            UserError: as the branches.
        """
        self.pyramid.load()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps `(B, D_i, H_i, W_i)` of images `(B, C, H, W)`, normalised as ImageNet's."""
        (states,) = self.pyramid(image)
        return [state.tokens.transpose(1, 2).unflatten(2, state.grid) for state in states]


class AddedMlps(nn.Module):
    """A small network for each branch, on the finer one's grid; what they give is added.

    Args:
        dims: Channels of the two maps.
        dim: Of the language model's tokens, a multiple of 32.

    Raises:
        UserError: a width that is none.
    """

    def __init__(self, dims: Sequence[int], dim: int):
        super().__init__()
        if dim % 32:
            raise UserError(f"language: found tokens of {dim} numbers, expected a multiple of 32, the groups of a norm")
        self.first = nn.ModuleList(nn.Linear(width, dim) for width in dims)
        self.norms = nn.ModuleList(nn.GroupNorm(32, dim) for _ in dims)
        self.second = nn.ModuleList(nn.Linear(dim, dim) for _ in dims)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Tokens `(B, H W, dim)` of maps `(B, D_i, H_i, W_i)`, row by row of the last one's grid (H, W)."""
        coarse, fine = maps
        wide = coarse.to(torch.promote_types(coarse.dtype, torch.float32))
        wide = F.interpolate(wide, size=fine.shape[2:], mode="bilinear", align_corners=False)
        tokens = [x.flatten(2).transpose(1, 2) for x in (wide.to(coarse), fine)]
        parts = zip(tokens, self.first, self.norms, self.second)
        return sum(second(F.gelu(norm(first(x).transpose(1, 2)).transpose(1, 2))) for x, first, norm, second in parts)


def llava_tower(name: str, weights: Sequence[str] | None = None) -> LlavaTower:
    """One of the authors' five, by models and the sizes of their images, the finer branch's first.

    Args:
        name: `clip_bl_512_256`, `convnext_b_clip_l_640_224`, `clip_bl_512_448`, `convnext_b_clip_l_1024_336` or
            `convnext_l_clip_l_1024_336`; the first two have 2 interactions, the others 12.
        weights: Of CLIP-L and of the finer branch, `hub`, a file or `random`; None is the hub.

    Raises:
        UserError: no such name, or weights of another number of branches.
    """
    if name not in PRESETS:
        raise UserError(f"name: found '{name}', expected one of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    files = ["hub", "hub"] if weights is None else list(weights)
    if len(files) != 2:
        raise UserError(f"weights: found {len(files)}, expected 2, of CLIP-L and of the finer branch")
    letter, fine, coarse, pretrained, interactions = PRESETS[name]
    large = ClipBranch(LARGE.format(pretrained), coarse, interactions, files[0])
    if letter:
        finer: Branch = ConvNextBranch(CONVNEXTS[letter], fine, (20, 19) if interactions == 2 else None, files[1])
    else:
        finer = ClipBranch(BASE, fine, interactions, files[1])
    return LlavaTower([large, finer], name=name)
