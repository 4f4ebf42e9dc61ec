"""Checkpoints of PIIP's code for pyramids of ConvNeXts, BEiTs and InternViTs, UperNet and Mask R-CNN on them: names,
and what the networks give."""

import math
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from penstock.lightning_modules.nets.mask_rcnn import MaskDetector
from penstock.lightning_modules.nets.piip.beit import BeitBranch
from penstock.lightning_modules.nets.piip.convnext import ConvNextBranch
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.hybrid import PiipHybridBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.intern_vit import InternVitBranch
from penstock.lightning_modules.nets.piip.vit import VitBranch
from penstock.lightning_modules.nets.upernet import SegmentationNet
from penstock.lightning_modules.weights.piip import detector_state, own_name, own_state, segmenter_state

Shapes = dict[str, tuple[int, ...]]
HEADS, POINTS = 8, 4


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def convnext(depths: list[int], dims: list[int]) -> Shapes:
    """Of transformers' `ConvNextModel`."""
    found = layer("embeddings.patch_embeddings", dims[0], 3, 4, 4) | layer("embeddings.layernorm", dims[0])
    for s, (depth, dim) in enumerate(zip(depths, dims)):
        stage = f"encoder.stages.{s}"
        if s:
            found |= layer(f"{stage}.downsampling_layer.0", dims[s - 1])
            found |= layer(f"{stage}.downsampling_layer.1", dim, dims[s - 1], 2, 2)
        for k in range(depth):
            block = f"{stage}.layers.{k}"
            found |= {f"{block}.layer_scale_parameter": (dim,)}
            found |= layer(f"{block}.dwconv", dim, 1, 7, 7) | layer(f"{block}.layernorm", dim)
            found |= layer(f"{block}.pwconv1", 4 * dim, dim) | layer(f"{block}.pwconv2", dim, 4 * dim)
    return {f"convnext_model.{k}": v for k, v in (found | layer("layernorm", dims[-1])).items()}


def transformer(dim: int, depth: int, table: int, norms: bool = True, bias: bool = True) -> Shapes:
    """Patches, and what the blocks of all kinds have; `table` positions, norms and projections with bias or without."""
    found = layer("patch_embed.proj", dim, 3, 16, 16) | ({"pos_embed": (1, table, dim)} if table else {})
    for k in range(depth):
        block = f"blocks.{k}"
        found |= layer(f"{block}.norm1", dim, bias=norms) | layer(f"{block}.norm2", dim, bias=norms)
        found |= layer(f"{block}.attn.qkv", 3 * dim, dim, bias=bias) | layer(f"{block}.attn.proj", dim, dim)
        found |= layer(f"{block}.mlp.fc1", 2 * dim, dim) | layer(f"{block}.mlp.fc2", dim, 2 * dim)
    return found


def deit(dim: int, depth: int) -> Shapes:
    return transformer(dim, depth, 14**2) | {f"blocks.{k}.gamma_{i}": (dim,) for k in range(depth) for i in (1, 2)}


def beit(dim: int, depth: int, heads: int, window: int) -> Shapes:
    found = transformer(dim, depth, 0, bias=False)
    for k in range(depth):
        found |= {f"blocks.{k}.gamma_{i}": (dim,) for i in (1, 2)}
        found |= {f"blocks.{k}.attn.{name}_bias": (dim,) for name in "qv"}
        found[f"blocks.{k}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
        found[f"blocks.{k}.attn.relative_position_index"] = (window**2, window**2)
    return found


def intern_vit(dim: int, depth: int, large: bool) -> Shapes:
    """The 6B, or a MAE model under the same names."""
    found = transformer(dim, depth, 14**2 + 1, norms=not large, bias=not large)
    found |= {f"blocks.{k}.ls{i}.gamma": (dim,) for k in range(depth) for i in (1, 2)}
    if large:
        found |= {f"blocks.{k}.attn.{name}_norm.weight": (dim,) for k in range(depth) for name in "qk"}
    return found


def injector(dim: int) -> Shapes:
    inside = dim // 4
    found = {"ca_gamma": (dim,), "cffn_gamma": (dim,)}
    for name in ("query_norm", "feat_norm", "ffn_norm"):
        found |= layer(name, dim)
    found |= layer("attn.sampling_offsets", HEADS * POINTS * 2, dim)
    found |= layer("attn.attention_weights", HEADS * POINTS, dim)
    found |= layer("attn.value_proj", dim // 2, dim) | layer("attn.output_proj", dim, dim // 2)
    found |= layer("ffn.fc1", inside, dim) | layer("ffn.dwconv.dwconv", inside, 1, 3, 3)
    return found | layer("ffn.fc2", dim, inside)


def interactions(dims: list[list[int]]) -> Shapes:
    """Of channels after each group, of each branch."""
    found = {}
    for k, widths in enumerate(zip(*dims)):
        for i, (coarse, fine) in enumerate(pairwise(widths), 1):
            unit = f"interactions.{k}.interaction_units_{i}{i + 1}"
            found |= layer(f"{unit}.branch2to1_proj", coarse, fine) | layer(f"{unit}.branch1to2_proj", fine, coarse)
            for way, dim in (("2to1", coarse), ("1to2", fine)):
                found |= {f"{unit}.branch{way}_injector.{name}": shape for name, shape in injector(dim).items()}
    return found


def hybrid_merges(dims: list[list[int]]) -> Shapes:
    """Of those after the first three interactions and the last."""
    found = {}
    for k, widths in enumerate(zip(*dims)):
        branch, scalar = (
            f"intermediate_merging_{k}_{x}" if k < 3 else y for x, y in (("branch", "merge_branch"), "ww")
        )
        found |= layer(f"{branch}1.0", widths[0]) | {f"{scalar}{i + 1}": () for i in range(len(widths))}
        for i, dim in enumerate(widths[1:], 2):
            found |= layer(f"{branch}{i}.0", widths[0], dim, 3, 3, bias=False) | layer(f"{branch}{i}.1", widths[0])
    return found


def dense_merge(dims: list[int]) -> Shapes:
    found = {f"w{i}": () for i in range(1, len(dims) + 1)}
    for i, dim in enumerate(dims, 1):
        for part, width in ((0, dim), (3, dims[0])):
            found |= layer(f"merge_branch{i}.{part}", dims[0], width, 3, 3, bias=False)
            found |= layer(f"merge_branch{i}.{part + 1}", dims[0])
    return found


def fpn(quarter: int, eighth: int) -> Shapes:
    found = layer("fpn1.1", quarter)
    for name, dim in (("fpn1.0", quarter), ("fpn1.3", quarter), ("fpn2.0", eighth)):
        found |= {f"{name}.weight": (dim, dim, 2, 2), f"{name}.bias": (dim,)}
    return found


def branches(*shapes: Shapes) -> Shapes:
    return {f"branch{i}.{name}": shape for i, one in enumerate(shapes, 1) for name, shape in one.items()}


DEPTHS = {"T": [1, 1, 1, 1], "B": [1, 1, 2, 1]}
DIMS = {"T": [32, 32, 64, 96], "B": [64, 96, 128, 160]}
GROUPS = {"T": [1, 2, 2, 2], "B": [1, 2, 3, 2]}


def own_convnext(letter: str, size: int) -> ConvNextBranch:
    shape = {"depths": DEPTHS[letter], "embed_dims": DIMS[letter]}
    return ConvNextBranch("convnext_tiny", size, GROUPS[letter], "random", **shape)


def own_vit(dim: int, depth: int, size: int, groups: int, **options) -> VitBranch:
    shape = {"embed_dim": dim, "depth": depth, "num_heads": dim // 32, "mlp_ratio": 2}
    return VitBranch("vit_tiny_patch16_224", size, groups, "random", **shape, **options)


UNIT = partial(InteractionUnit, heads=HEADS)


def convnext_finest() -> tuple[Shapes, nn.Module]:
    dims = [DIMS["B"], [64] * 4, DIMS["T"]]
    shapes = branches(convnext(DEPTHS["B"], DIMS["B"]), deit(64, 4), convnext(DEPTHS["T"], DIMS["T"]))
    own = [own_convnext("B", 64), own_vit(64, 4, 96, 4, window=3), own_convnext("T", 128)]
    return shapes | interactions(dims) | hybrid_merges(dims), PiipHybridBackbone(own, (0, 1, 2), UNIT)


def vit_finest() -> tuple[Shapes, nn.Module]:
    dims = [DIMS["B"], DIMS["T"], [32] * 4]
    shapes = branches(convnext(DEPTHS["B"], DIMS["B"]), convnext(DEPTHS["T"], DIMS["T"]), deit(32, 4))
    own = [own_convnext("B", 64), own_convnext("T", 96), own_vit(32, 4, 128, 4)]
    return shapes | interactions(dims) | hybrid_merges(dims) | fpn(64, 96), PiipHybridBackbone(own, (0, 1, 2), UNIT)


def of_beits() -> tuple[Shapes, nn.Module]:
    dims = [96, 64, 32]
    shapes = branches(beit(96, 4, 3, 3), beit(64, 2, 2, 3), deit(32, 2))
    name, ratio = "beitv2_base_patch16_224", {"mlp_ratio": 2}
    own = [
        BeitBranch(name, 64, 2, "random", window=3, embed_dim=96, depth=4, num_heads=3, **ratio),
        BeitBranch(name, 96, 2, "random", window=3, embed_dim=64, depth=2, num_heads=2, **ratio),
        own_vit(32, 2, 128, 2, window=3),
    ]
    return shapes | interactions([[d] * 2 for d in dims]) | dense_merge(dims) | fpn(96, 96), PiipBackbone(own, UNIT)


def of_intern_vit() -> tuple[Shapes, nn.Module]:
    dims = [96, 64]
    shapes = branches(intern_vit(96, 4, True), intern_vit(64, 2, False))
    large = InternVitBranch(64, 2, "random", window=3, embed_dim=96, depth=4, num_heads=3, mlp_ratio=2)
    own = [large, own_vit(64, 2, 128, 2)]
    return shapes | interactions([[d] * 2 for d in dims]) | dense_merge(dims) | fpn(96, 96), PiipBackbone(own, UNIT)


def filled(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values that name and shape decide."""
    i = torch.arange(math.prod(shape))
    if name.endswith("relative_position_index"):
        return i.reshape(shape)
    y = torch.sin((i * i % 1009 + zlib.crc32(name.encode()) % 97).double())
    return (y / math.sqrt(len(i) / shape[0]) if len(shape) > 1 else 1 + y / 3).reshape(shape)


def probes(maps: list[Tensor]) -> Iterator[list[float]]:
    """Two numbers of each map that depend on all of it."""
    for x in maps:
        weights = filled("probe", (2, x.numel()))
        yield (weights @ x.double().flatten()).tolist()


CASES = {
    "convnext_finest": (
        convnext_finest,
        [
            [-24.324359077110422, -25.980779751971614],
            [-17.45295966728118, -17.83740730020955],
            [-9.23398462819153, -9.50182199957081],
            [-4.07235105795138, -3.5163323061018414],
        ],
    ),
    "vit_finest": (
        vit_finest,
        [
            [-7.693829997994812, -8.116099600072726],
            [-5.490135171736606, -5.812883337319693],
            [-8.534920525558867, -9.403992513663642],
            [-6.266400449537787, -4.675213128434835],
        ],
    ),
    "beits": (
        of_beits,
        [
            [-10.046521737372773, -9.679553478468877],
            [-5.813121335623499, -4.463004534409731],
            [-8.537198149975932, -9.285859615419682],
            [-3.1832387964112026, -0.4465416944327006],
        ],
    ),
    "intern_vit": (
        of_intern_vit,
        [
            [-10.145907152444368, -9.771822652181543],
            [-5.279769100392464, -4.917096991381098],
            [-4.036822190374945, -4.9409816349472955],
            [-2.2446005290037454, -0.9346526598836564],
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_official_networks_give(name):
    """The numbers are of the official code in double precision."""
    make, recorded = CASES[name]
    shapes, net = make()
    official = {key: filled(key, shape) for key, shape in shapes.items()}
    net.double().eval().load_state_dict(own_state({f"backbone.{key}": value for key, value in official.items()}))
    with torch.no_grad():
        found = list(probes(net(filled("image", (2, 3, 144, 208)).mul(500))))
    assert found == [pytest.approx(expected, rel=1e-9, abs=1e-9) for expected in recorded]


def test_names_of_a_hybrid():
    for official, own in {
        "branch2.convnext_model.encoder.stages.1.layers.0.pwconv2.bias": "branches.1.stages.1.blocks.0.mlp.fc2.bias",
        "branch3.convnext_model.encoder.stages.2.downsampling_layer.1.bias": "branches.2.stages.2.downsample.1.bias",
        "branch1.convnext_model.embeddings.layernorm.weight": "branches.0.stem.1.weight",
        "branch1.blocks.3.attn.q_norm.weight": "branches.0.blocks.3.attn.q_norm.weight",
        "branch1.blocks.3.ls2.gamma": "branches.0.blocks.3.ls2.gamma",
        "branch1.blocks.3.gamma_2": "branches.0.blocks.3.ls2.gamma",
    }.items():
        assert own_name(official) == f"pyramid.{own}"
    assert own_name("intermediate_merging_10_w2") == "merges.10.weights.1"
    assert own_name("intermediate_merging_10_branch3.0.weight") == "merges.10.projections.2.0.weight"
    assert own_name("merge_branch1.0.bias") == "merge.projections.0.0.bias"


def test_a_hybrids_tensors_arrive_where_they_belong():
    shapes, net = vit_finest()
    official = {name: filled(name, shape) for name, shape in shapes.items()}
    own = own_state(official)
    assert len(official) - len(own) == 4  # the final norms of two ConvNeXts
    net.double().load_state_dict(own)
    assert net.merges["1"].weights[2].item() == official["intermediate_merging_1_w3"].item()
    assert torch.equal(net.merges["2"].projections[1][0].weight, official["intermediate_merging_2_branch2.0.weight"])
    assert torch.equal(net.merge.projections[0][0].weight, official["merge_branch1.0.weight"])
    assert torch.equal(net.fpn.eighth.bias, official["fpn2.0.bias"])
    kernel = official["branch2.convnext_model.encoder.stages.1.layers.0.dwconv.weight"]
    assert torch.equal(net.pyramid.branches[1].stages[1].blocks[0].conv_dw.weight, kernel)


def unit(name: str, out: int, width: int, side: int) -> Shapes:
    """mmcv's convolution with a norm."""
    found = {f"{name}.conv.weight": (out, width, side, side), f"{name}.bn.num_batches_tracked": ()}
    return found | {f"{name}.bn.{key}": (out,) for key in ("weight", "bias", "running_mean", "running_var")}


def upernet(dim: int, channels: int, classes: int) -> Shapes:
    """mmsegmentation's heads, by its names."""
    found = layer("decode_head.conv_seg", classes, channels, 1, 1)
    for k in range(4):
        found |= unit(f"decode_head.psp_modules.{k}.1", channels, dim, 1)
    for k in range(3):
        found |= unit(f"decode_head.lateral_convs.{k}", channels, dim, 1)
        found |= unit(f"decode_head.fpn_convs.{k}", channels, channels, 3)
    found |= unit("decode_head.bottleneck", channels, dim + 4 * channels, 3)
    found |= unit("decode_head.fpn_bottleneck", channels, 4 * channels, 3)
    return (
        found
        | unit("auxiliary_head.convs.0", channels, dim, 3)
        | layer("auxiliary_head.conv_seg", classes, channels, 1, 1)
    )


def mask_rcnn(dim: int, channels: int, hidden: int, classes: int) -> Shapes:
    """mmdetection's neck and heads, by its names."""
    found = layer("rpn_head.rpn_conv", channels, channels, 3, 3)
    found |= layer("rpn_head.rpn_cls", 3, channels, 1, 1) | layer("rpn_head.rpn_reg", 12, channels, 1, 1)
    for k in range(4):
        found |= layer(f"neck.lateral_convs.{k}.conv", channels, dim, 1, 1)
        found |= layer(f"neck.fpn_convs.{k}.conv", channels, channels, 3, 3)
        found |= layer(f"roi_head.mask_head.convs.{k}.conv", channels, channels, 3, 3)
    found |= layer("roi_head.bbox_head.shared_fcs.0", hidden, channels * 49)
    found |= layer("roi_head.bbox_head.shared_fcs.1", hidden, hidden)
    found |= layer("roi_head.bbox_head.fc_cls", classes + 1, hidden)
    found |= layer("roi_head.bbox_head.fc_reg", 4 * classes, hidden)
    found |= {"roi_head.mask_head.upsample.weight": (channels, channels, 2, 2)}
    found |= {"roi_head.mask_head.upsample.bias": (channels,)}
    return found | layer("roi_head.mask_head.conv_logits", classes, channels, 1, 1)


def backbone(size: int, resize_table: bool) -> tuple[Shapes, PiipBackbone]:
    """An InternViT and a MAE model, interactions without projections and norms, as on ADE20K."""
    cells = (size // 16) ** 2 if resize_table else 14**2
    shapes = branches(intern_vit(64, 2, True), intern_vit(32, 2, False))
    shapes |= {f"branch{i}.pos_embed": (1, cells + 1, dim) for i, dim in ((1, 64), (2, 32))}
    for k in range(2):
        for way, dim, other in (("2to1", 64, 32), ("1to2", 32, 64)):
            own = {name: shape for name, shape in injector(dim).items() if "norm" not in name}
            own |= {"attn.value_proj.weight": (dim // 2, other)}
            place = f"interactions.{k}.interaction_units_12.branch{way}_injector"
            shapes |= {f"{place}.{name}": shape for name, shape in own.items()}
    branch = InternVitBranch(size, 2, "random", resize_table, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2)
    own = [branch, own_vit(32, 2, size, 2, resize_table=resize_table)]
    shapes |= dense_merge([64, 32]) | fpn(64, 64)
    return {f"backbone.{k}": v for k, v in shapes.items()}, PiipBackbone(own, partial(UNIT, speed_up=True))


def test_heads_of_mmsegmentation_against_transformers():
    """The library's heads have mmsegmentation's names but for two words, and are not of our making."""
    library = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    shapes, pyramid = backbone(128, True)
    shapes |= upernet(64, 6, 5)
    official = {name: filled(name, shape) for name, shape in shapes.items()}
    own = segmenter_state(official)
    net = SegmentationNet(pyramid, 5, channels=6, auxiliary_channels=6).double()
    assert len(own) == len(official)
    net.load_state_dict(own)
    pooled = "psp_modules.2.1.bn"
    assert torch.equal(net.head.smooth[1][0].weight, official["decode_head.fpn_convs.1.conv.weight"])
    assert torch.equal(net.head.pooling.pools[2][1][1].running_var, official[f"decode_head.{pooled}.running_var"])
    table = official["backbone.branch1.pos_embed"]
    assert torch.equal(net.backbone.pyramid.branches[0].pos_embed, table[:, 1:])
    config = library.UperNetConfig(
        hidden_size=6, num_labels=5, auxiliary_channels=6, auxiliary_num_convs=1, auxiliary_concat_input=False
    )
    for name, head in (
        ("decode_head.", library.UperNetHead(config, [64] * 4)),
        ("auxiliary_head.", library.UperNetFCNHead(config, [64] * 4)),
    ):
        state = {key.removeprefix(name): value for key, value in official.items() if key.startswith(name)}
        names = {key: key.replace(".bn.", ".batch_norm.").replace("conv_seg.", "classifier.") for key in state}
        head.double().eval().load_state_dict({names[key]: value for key, value in state.items()})
        maps = [filled(f"map {k}", (2, 64, 32 >> k, 48 >> k)) for k in range(4)]
        net.eval()
        found = net.head(maps) if name == "decode_head." else net.auxiliary(maps[2])
        with torch.no_grad():
            assert (found - head(maps)).abs().max() < 1e-10 * found.abs().max()


def test_heads_of_mmdetection():
    """The background is the last class there and the first here."""
    shapes, pyramid = backbone(128, False)
    shapes |= mask_rcnn(64, 8, 12, 3)
    official = {name: filled(name, shape) for name, shape in shapes.items()}
    own = detector_state(official)
    net = MaskDetector(pyramid, 3, channels=8, hidden=12, aligned=True).double()
    assert len(own) == len(official)
    net.load_state_dict(own)
    heads, x = net.net.roi_heads, filled("regions", (5, 8, 7, 7))
    hidden = x.flatten(1)
    for k in range(2):
        place = f"roi_head.bbox_head.shared_fcs.{k}"
        hidden = (hidden @ official[f"{place}.weight"].T + official[f"{place}.bias"]).relu()
    logits, deltas = (
        hidden @ official[f"roi_head.bbox_head.fc_{name}.weight"].T + official[f"roi_head.bbox_head.fc_{name}.bias"]
        for name in ("cls", "reg")
    )
    found = heads.box_predictor(heads.box_head(x))
    assert (found[0][:, [1, 2, 3, 0]] - logits).abs().max() < 1e-12
    assert (found[1][:, 4:] - deltas).abs().max() < 1e-12
    assert torch.equal(heads.mask_head[2][0].bias, official["roi_head.mask_head.convs.2.conv.bias"])
    masks = heads.mask_predictor.mask_fcn_logits
    assert torch.equal(masks.weight[1:], official["roi_head.mask_head.conv_logits.weight"])
    assert torch.equal(net.net.rpn.head.bbox_pred.weight, official["rpn_head.rpn_reg.weight"])
    pyramid_ = net.net.backbone.pyramid.fpn
    assert torch.equal(pyramid_.layer_blocks[3][0].weight, official["neck.fpn_convs.3.conv.weight"])
    assert torch.equal(pyramid_.inner_blocks[1][0].bias, official["neck.lateral_convs.1.conv.bias"])
