"""PIIP's parts and networks against recorded numbers of the official code."""

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.cross_attention import DeformableAttention, centers
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit, State
from penstock.lightning_modules.nets.piip.pyramid import Pyramid
from penstock.lightning_modules.nets.piip.resizing import resized_image, resized_kernel, resized_table
from penstock.lightning_modules.nets.piip.vit import VitBranch
from penstock.lightning_modules.nets.piip.window_attention import attend
from penstock.lightning_modules.weights.piip import own_name, own_state

UNIT = "interactions.0.interaction_units_12."
ROUNDED = 1e-6  # results stored in float32


def half_squares(*outputs: Tensor) -> Tensor:
    return sum(0.5 * y.square().sum() for y in outputs)


def same(case, found: Tensor, key: str) -> None:
    """Compares an outcome, of which the file may hold a rounded form."""
    if case.out[key].dtype == torch.float64:
        case.same(found, key)
    else:
        assert case.error(found, key) < ROUNDED, key
        case.left.discard(key)


def grid(record, key: str) -> tuple[int, int]:
    return tuple(record[key].tolist())


def test_deformable_attention(record):
    case = record("piip", "03")
    attn = DeformableAttention(32, 48)
    same(case, attn.sampling_offsets.bias, "init_sampling_offsets_bias")
    same(case, attn.attention_weights.bias, "init_attention_weights_bias")
    case.load(attn)
    query, feat = (case[key].requires_grad_() for key in ("query", "feat"))
    same(case, centers(grid(case, "query_grid"), query.device, query.dtype), "reference_points")
    out = attn(query, grid(case, "query_grid"), feat, grid(case, "key_grid"))
    same(case, out, "output")
    half_squares(out).backward()
    same(case, query.grad, "grad_query")
    same(case, feat.grad, "grad_feat")
    for name, parameter in attn.named_parameters():
        same(case, parameter.grad, f"grad/{name}")


UNITS = {
    "04": InteractionUnit(64, 32),
    "05": InteractionUnit(64, 32, heads=8, speed_up=True),
    "06": InteractionUnit(48, 32, "dense", heads=4),
}


@pytest.mark.parametrize("name", UNITS)
def test_interaction_unit(record, name):
    case, unit = record("piip", name), UNITS[name].eval()
    unit.load_state_dict(
        {own_name(UNIT + k).removeprefix("pyramid.interactions.0.0."): v for k, v in case.weights.items()}
    )
    unit.double()
    states = [State(case[f"x{i}"].requires_grad_(), grid(case, f"grid{i}")) for i in (1, 2)]
    found = unit(*states)
    half_squares(*(state.tokens for state in found)).backward()
    for i in (1, 2):
        same(case, found[i - 1].tokens, f"y{i}")
        same(case, states[i - 1].tokens.grad, f"grad_x{i}")
    compare_gradients(case, unit, UNIT, "pyramid.interactions.0.0.")


def compare_gradients(case, net: nn.Module, prefix: str = "", ours: str = "") -> None:
    """All recorded gradients of parameters."""
    parameters = dict(net.named_parameters())
    for key in sorted(case.left):
        if key.startswith("grad/"):
            name = own_name(prefix + key.removeprefix("grad/")).removeprefix(ours)
            if name not in parameters:
                name = f"merged.{name}"
            same(case, parameters[name].grad, key)


def test_resizing(record):
    case = record("piip", "10")
    before, after, _, patch = case["sizes"].tolist()
    table = case["pos_embed_with_cls"][:, 1:]
    assert table.shape[1] == before**2
    same(case, resized_table(table, (after, after)), "pos_embed")
    same(case, resized_table(table, grid(case, "rect")), "pos_embed_rect")
    same(case, resized_kernel(case["patch_kernel"], patch), "patch_kernel")
    same(case, resized_image(case["image"], float(case["ratio"])), "image_small")


def test_window_attention(record):
    case = record("piip", "11")
    height, width, window, heads = case["H_W_window_heads"].tolist()
    attn = case.load(Attention(24, heads, qkv_bias=True)).eval()
    x = case["x"]
    same(case, attend(attn, x, (height, width), None), "global")
    same(case, attend(attn, x, (height, width), window), "pad_after_qkv")
    same(case, attend(attn, x, (height, width), window, "inputs"), "pad_before_qkv")


def branch(
    dim: int, size: int, heads: int, ratio: float, groups, layer_scale: float | None = 1.0, **kwargs
) -> VitBranch:
    depth = groups if isinstance(groups, int) else sum(groups)
    return VitBranch(
        "vit_tiny_patch16_224", size, groups, "random", resize_table=True, in_chans=1, embed_dim=dim,
        depth=depth, num_heads=heads, mlp_ratio=ratio, layer_scale=layer_scale, **kwargs,
    )  # fmt: skip


def unit(heads: int):
    return lambda coarse, fine: InteractionUnit(coarse, fine, heads=heads)


def separate() -> PiipClassifier:
    own = {"num_classes": 7, "class_token": True}
    branches = [branch(64, 32, 4, 1, 2, **own), branch(48, 48, 3, 1, 2, **own), branch(32, 80, 1, 2, 2, **own)]
    return PiipClassifier(branches, 7, unit(8), token="first_patch")


def merged() -> PiipClassifier:
    branches = [branch(64, 32, 2, 1, 2), branch(32, 64, 2, 1, 2), branch(32, 112, 1, 1, [2, 2])]
    return PiipClassifier(branches, 5, unit(16), "merged")


def mixed() -> PiipClassifier:
    own = {"num_classes": 6, "class_token": True}
    branches = [branch(64, 48, 4, 1, [2, 1], None, **own), branch(32, 80, 2, 1, 2, **own)]
    return PiipClassifier(branches, 6, unit(8), token="first_patch")


NETS = {"07": separate, "08": merged, "09": mixed}


@pytest.mark.parametrize("name", NETS)
def test_classifier(record, name):
    case, net = record("piip", name), NETS[name]().eval()
    net.load_state_dict(own_state(case.weights))
    net.double()
    image = case["image"].requires_grad_()
    logits = net(image)
    same(case, logits, "logits")
    half_squares(logits).backward()
    same(case, image.grad, "grad_image")
    compare_gradients(case, net)
    states = net.pyramid(image, after=(0, 1))
    for k, row in enumerate(states):
        for i, state in enumerate(row, 1):
            same(case, state.tokens, f"tokens_after_interaction{k}_branch{i}")
            if state.cls is not None:
                same(case, state.cls, f"cls_after_interaction{k}_branch{i}")
    if net.merged is not None:
        same(case, net.merged.merge(states[-1]), "merged")
    with torch.no_grad():
        for parameter_name, parameter in net.named_parameters():
            if parameter_name.endswith("_gate"):
                parameter.zero_()
    if net.merged is None:
        same(case, net(image), "gates0_logits")
    else:
        same(case, net.merged.merge(net.pyramid(image)[0]), "gates0_merged")


def test_dense_backbone(record):
    case = record("piip", "12")
    branches = [
        branch(64, 32, 2, 1, 1),
        branch(32, 48, 2, 1, 1, window=2),
        branch(32, 64, 1, 1, [2], window=3, global_blocks=[1]),
    ]
    net = PiipBackbone(branches).eval()
    own = own_state(case.weights)
    for i, one in enumerate(branches):
        one.pos_embed = nn.Parameter(torch.empty_like(own[f"pyramid.branches.{i}.pos_embed"]))
    net.load_state_dict(own)
    net.double()
    image = case["image"].requires_grad_()
    maps = net(image)
    for i, y in enumerate(maps, 1):
        same(case, y, f"f{i}")
    half_squares(*maps).backward()
    same(case, image.grad, "grad_image")
    compare_gradients(case, net)
    states = net.pyramid(image)[0]
    for i, state in enumerate(states, 1):
        x = state.tokens.transpose(1, 2).unflatten(2, state.grid)
        same(case, x, f"branch{i}_tokens_before_merge")
        same(case, net.merge.projections[i - 1](x), f"branch{i}_projected")


def test_pyramid_is_the_models_alone_at_first():
    branches = [branch(64, 32, 2, 2, 2, class_token=True, window=None), branch(32, 64, 2, 2, 2, class_token=True)]
    net = Pyramid(branches).eval().double()
    image = torch.rand(2, 1, 64, 64, dtype=torch.float64) * 2 - 1
    for one, ratio, state in zip(branches, (0.5, 1.0), net(image)[0]):
        alone = one.embed(resized_image(image, ratio))
        for group in range(2):
            alone = one.run(group, alone)
        assert torch.equal(alone.tokens, state.tokens)
        assert torch.equal(alone.cls, state.cls)
