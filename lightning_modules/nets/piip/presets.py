"""The papers' pyramids by letters: which pretrained models see images of which sizes (arXiv 2406.04330, 2501.07783)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.beit import BeitBranch
from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.convnext import ConvNextBranch
from penstock.lightning_modules.nets.piip.dense import HALVES, Colour, PiipBackbone
from penstock.lightning_modules.nets.piip.hybrid import PiipHybridBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.intern_vit import InternVitBranch
from penstock.lightning_modules.nets.piip.merging import Token
from penstock.lightning_modules.nets.piip.vit import TransformerBranch, VitBranch

Pretrained = Literal["deit", "deit3", "deit3_384", "augreg", "augreg_384", "mae", "dinov2", "beitv2"]
DEIT3 = {
    "T": "deit_tiny_patch16_224.fb_in1k",
    "S": "deit3_small_patch16_224.fb_in22k_ft_in1k",
    "B": "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "L": "deit3_large_patch16_224.fb_in22k_ft_in1k",
}
HUGE_MODELS = {"H": "vit_huge_patch14_224.mae", "6": "InternViT-6B"}
MODELS: dict[str, dict[str, str]] = {
    "deit": {letter: f"deit_{name}_patch16_224.fb_in1k" for letter, name in zip("TSB", ("tiny", "small", "base"))},
    "deit3": DEIT3,
    "deit3_384": {
        letter: f"deit3_{name}_patch16_384.fb_in22k_ft_in1k" for letter, name in zip("SBL", ("small", "base", "large"))
    }
    | HUGE_MODELS,
    "augreg": {
        letter: f"vit_{name}_patch16_224.augreg_in21k_ft_in1k"
        for letter, name in zip("TSBL", ("tiny", "small", "base", "large"))
    },
    "augreg_384": {
        letter: f"vit_{name}_patch16_384.augreg_in21k_ft_in1k"
        for letter, name in zip("TSBL", ("tiny", "small", "base", "large"))
    },
    "mae": DEIT3 | HUGE_MODELS | {"B": "vit_base_patch16_224.mae", "L": "vit_large_patch16_224.mae"},
    "beitv2": DEIT3 | {"B": "beitv2_base_patch16_224.in1k_ft_in22k", "L": "beitv2_large_patch16_224.in1k_ft_in22k"},
    "dinov2": {letter: f"vit_{name}_patch14_dinov2.lvd142m" for letter, name in zip("SBL", ("small", "base", "large"))},
}
HYBRIDS = {f"C{letter}": f"convnext_{name}.fb_in1k" for letter, name in zip("TSB", ("tiny", "small", "base"))}
HYBRIDS |= {f"V{letter}": DEIT3[letter] for letter in "TSB"}
LONGEST = 48  # blocks of the deepest model
IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
HUGE = (2, 2, 2, 2, *[3] * 8)  # blocks in twelve groups of ViT-H
DROP_PATH = {"T": 0.05, "S": 0.05, "B": 0.15, "L": 0.4, "H": 0.4, "6": 0.4}
CONVNEXT_DROP_PATH = {"CT": 0.3, "CS": 0.3, "CB": 0.4}
STRONGER = {"S": 0.2, "B": 0.3}  # of dense AugReg and DINOv2 models


def dense(
    models: str,
    sizes: Sequence[int],
    pretrained: Pretrained = "deit3",
    window: int | None = 28,
    interactions: int = 12,
    weights: Sequence[str] | None = None,
    speed_up: bool = False,
    global_every: int | None = None,
    mean: Colour = HALVES,
    std: Colour = HALVES,
    maps: Literal[3, 4] = 4,
    resize_table: bool = False,
) -> PiipBackbone:
    """A backbone of dense tasks.

    Args:
        models: Letters of the models from the largest image to the smallest, such as `TSB` or `H6`.
        sizes: Sides of their images, pixels.
        pretrained: On what; small models of families without one are DeiT's, 6 is InternViT-6B.
        window: Side of windows of attention, cells; None is the whole image.
        interactions: Number of them.
        weights: Of each model, `hub`, a file or `random`; None is the hub.
        speed_up: See `InteractionUnit`; GELUs of blocks are then tanh's, as in the authors' fused layers.
        global_every: Every so many-th block sees the whole image all the same; None is no block.
        mean: See `MergedPyramid`.
        std: Likewise.
        maps: See `PiipBackbone`.
        resize_table: Whether tables of positions are those of `sizes` from the start, as segmenters have it; else they
            stay those of pretraining, and each image resizes them.

    Raises:
        UserError: letters or sizes that do not fit.
    """
    rates = DROP_PATH | (STRONGER if pretrained in ("augreg_384", "dinov2") else {})

    def branch(letter: str, model: str, size: int, file: str) -> TransformerBranch:
        groups = HUGE if (letter, interactions) == ("H", 12) else interactions
        own = {"size": size, "groups": groups, "weights": file, "window": window, "drop_path": rates[letter]}
        if global_every is not None:
            own["global_blocks"] = range(global_every - 1, LONGEST, global_every)
        if letter == "6":
            return InternVitBranch(resize_table=resize_table, **own)
        if model.startswith("beit"):
            if window is None:
                raise UserError("window: found none, expected the side of windows, which BEiT's models always have")
            return BeitBranch(model, **own)
        rule = "constant" if "deit" in model else "linear"
        return VitBranch(model, resize_table=resize_table, pad="inputs", drop_path_rule=rule, **own)

    branches = [branch(*one) for one in _named(models, sizes, pretrained, weights)]
    for block in (block for one in branches for block in one.blocks if speed_up):
        block.mlp.act = nn.GELU("tanh")
    return PiipBackbone(branches, partial(InteractionUnit, speed_up=speed_up), mean, std, maps)


def hybrid(
    models: Sequence[str], sizes: Sequence[int] = (1024, 672, 448), weights: Sequence[str] | None = None
) -> PiipHybridBackbone:
    """A backbone of dense tasks of convolutional networks and transformers, twelve interactions.

    Args:
        models: `C` or `V` with a letter, from the largest image to the smallest, such as `[CT, VS, VB]`.
        sizes: Sides of their images, pixels.
        weights: Of each model, `hub`, a file or `random`; None is the hub.

    Raises:
        UserError: names or sizes that do not fit.
    """

    def branch(name: str, model: str, size: int, file: str) -> TransformerBranch | ConvNextBranch:
        if name.startswith("C"):
            return ConvNextBranch(model, size, weights=file, drop_path=CONVNEXT_DROP_PATH[name])
        return VitBranch(model, size, weights=file, window=14, pad="inputs", drop_path=DROP_PATH[name[1:]])

    return PiipHybridBackbone([branch(*one) for one in _paired(models, sizes, weights, HYBRIDS)], **IMAGENET)


def classifier(
    models: str,
    sizes: Sequence[int],
    num_classes: int,
    pretrained: Pretrained = "deit",
    interactions: int = 12,
    weights: Sequence[str] | None = None,
    token: Token = "class",
) -> PiipClassifier:
    """A classifier of as many heads as branches; arguments as `dense`'s.

    Args:
        models: Letters.
        sizes: Of images.
        num_classes: K.
        pretrained: On what.
        interactions: Number of them.
        weights: Of each model.
        token: See `mean_of_heads`.

    Raises:
        UserError: letters or sizes that do not fit.
    """
    rates = DROP_PATH | {"B": 0.2}
    branches = [
        VitBranch(
            model,
            size,
            interactions,
            file,
            num_classes=num_classes,
            class_token=True,
            resize_table=True,
            drop_path=rates[letter],
            drop_path_rule="constant" if pretrained == "deit" else "linear",
            layer_scale=1.0 if pretrained == "deit" else None,
        )
        for letter, model, size, file in _named(models, sizes, pretrained, weights)
    ]
    return PiipClassifier(branches, num_classes, token=token)


def _named(
    models: str, sizes: Sequence[int], pretrained: str, weights: Sequence[str] | None
) -> list[tuple[str, str, int, str]]:
    """Letter, timm's name, size and weights of each branch, the smallest image first."""
    return _paired(models, sizes, weights, MODELS[pretrained], f" for pretrained={pretrained}")


def _paired(
    models: Sequence[str],
    sizes: Sequence[int],
    weights: Sequence[str] | None,
    known: Mapping[str, str],
    where: str = "",
) -> list[tuple[str, str, int, str]]:
    if not models or not set(models) <= set(known):
        raise UserError(f"models: found {models}, expected some of {', '.join(known)}{where}")
    files = ["hub"] * len(models) if weights is None else list(weights)
    for name, found in (("sizes", sizes), ("weights", files)):
        if len(found) != len(models):
            raise UserError(f"{name}: found {len(found)}, expected {len(models)}, one for each of models={models}")
    return list(zip(models, (known[letter] for letter in models), sizes, files))[::-1]
