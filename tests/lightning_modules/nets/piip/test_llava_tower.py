"""The eyes of PIIP-LLaVA: CLIP as a branch, visual tokens, costs of the authors' five, the projector."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.clip import ClipBranch, timm_state
from penstock.lightning_modules.nets.piip.convnext import ConvNextBranch
from penstock.lightning_modules.nets.piip.flops import counted
from penstock.lightning_modules.nets.piip.interaction import Injector
from penstock.lightning_modules.nets.piip.llava_tower import (
    PRESETS,
    PUBLISHED,
    AddedMlps,
    LlavaTower,
    llava_tower,
)
from penstock.lightning_modules.nets.piip.resizing import resized_kernel, resized_table

MODEL = "vit_base_patch16_clip_quickgelu_224"
PARTS = ["pyramid.branches.0.", "pyramid.branches.1.", "pyramid.interactions."]


def clip(size: int, dim: int = 64, **kwargs) -> ClipBranch:
    return ClipBranch(
        MODEL, size, **{"groups": 2, "weights": "random", "depth": 4, "num_heads": 2, **kwargs}, embed_dim=dim
    )


def randomized(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.double().eval()


@pytest.mark.parametrize(
    ("name", "tokens", "groups"),
    [
        ("clip_bl_512_256", 1024, ([12, 12], [6, 6])),
        ("convnext_b_clip_l_640_224", 400, ([12, 12], [20, 19])),
        ("clip_bl_512_448", 1024, ([2] * 12, [1] * 12)),
        ("convnext_b_clip_l_1024_336", 1024, ([2] * 12, [3, 4, 4, *[3] * 8, 4])),
        ("convnext_l_clip_l_1024_336", 1024, ([2] * 12, [3, 4, 4, *[3] * 8, 4])),
    ],
)
def test_tokens_groups_and_costs_of_the_authors(name, tokens, groups):
    with torch.device("meta"):
        tower = llava_tower(name, ["random", "random"]).eval()
        coarse, fine = branches = list(tower.pyramid.branches)
        sides = [branch.size // branch.strides[-1] for branch in branches]
        maps = [torch.empty(1, dim, side, side) for dim, side in zip(tower.dims, sides)]
        visual = AddedMlps(tower.dims, 64)(maps)
    assert tuple([b - a for a, b in branch.bounds] for branch in branches) == groups
    assert visual.shape == (1, tokens, 64)
    assert tower.tokens == tokens < sum(x[0, 0].numel() for x in maps)  # what concatenation would give
    total = sum(part.operations for part in counted(tower, (tower.image_size,) * 2, PARTS).values())
    # the authors count deformable attention on the finer branch's first grid throughout, also where it has shrunk
    first = (fine.size // fine.strides[0]) ** 2
    total += sum(20 * dim * (first - (fine.size // stride) ** 2) for dim, stride in zip(fine.dims, fine.strides))
    assert total / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)
    assert coarse.pos_embed.shape[1] == (21 if PRESETS[name][3] == 336 else 14) ** 2


def test_clip_is_that_of_transformers_before_its_last_norm():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra llava)")
    options = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    net = randomized(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**options, image_size=64, patch_size=16))
    )
    branch = clip(64).double()
    branch.pos_embed = nn.Parameter(branch.pos_embed.detach()[:, :16])
    branch.load_pretrained(net.state_dict())
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = net(image, output_hidden_states=True).hidden_states
    state = branch.embed(image)
    for k in range(3):
        state = branch.run(k - 1, state) if k else state
        found = torch.cat([state.cls, state.tokens], 1)
        torch.testing.assert_close(found, expected[2 * k], rtol=0, atol=1e-10)
    larger = branch.embed(torch.randn(1, 3, 96, 96, dtype=torch.float64))
    assert larger.grid == (6, 6)


def test_weights_of_other_patches_and_grids_are_resized():
    branch, other = clip(32, dim=32), clip(32, dim=32, patch=8)
    state = other.state_dict() | {"pos_embed": torch.randn(1, 1 + 16**2, 32)}
    state = {name: value for name, value in state.items() if name != "cls_position"}
    branch.load_pretrained(state)
    torch.testing.assert_close(branch.patch_embed.weight, resized_kernel(other.patch_embed.weight, 16))
    torch.testing.assert_close(branch.pos_embed, resized_table(state["pos_embed"][:, 1:], (14, 14)))
    assert branch.cls_position.equal(state["pos_embed"][:, :1])
    assert branch.cls_token.equal(other.cls_token)
    with pytest.raises(UserError, match=r"weights: 'patch_embed.weight' is missing"):
        branch.load_pretrained({"cls_token": state["cls_token"]})
    assert timm_state(state) == state


def test_branches_alone_while_gates_are_zero():
    fine = ConvNextBranch("convnext_atto", 64, [6, 5], "random", depths=[2] * 4, embed_dims=[32, 32, 64, 64])
    tower = randomized(LlavaTower([clip(32), fine]))
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    gates = [gate for unit in tower.modules() if isinstance(unit, Injector) for gate in (unit.attn_gate, unit.ffn_gate)]
    interacting = tower(image)
    for gate in gates:
        nn.init.zeros_(gate)
    for branch, found, other in zip(tower.pyramid.branches, tower(image), interacting):
        state = branch.embed(F.interpolate(image, scale_factor=branch.size / 64, mode="bilinear"))
        for k in range(2):
            state = branch.run(k, state)
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), state.tokens, rtol=0, atol=1e-10)
        assert (found - other).abs().max() > 1e-3


def mlp(x: Tensor, net: AddedMlps, k: int) -> Tensor:
    """Of one branch, cell by cell but for the statistics of 32 groups of channels."""
    y = net.first[k](x.permute(0, 2, 3, 1))
    groups = y.unflatten(3, (32, -1))
    mean, var = (
        f(groups, dim=(1, 2, 4), keepdim=True) for f in (torch.mean, lambda v, **kw: v.var(correction=0, **kw))
    )
    y = ((groups - mean) / (var + 1e-5).sqrt()).flatten(3) * net.norms[k].weight + net.norms[k].bias
    return net.second[k](F.gelu(y)).flatten(1, 2)


def test_the_projector_adds_what_both_branches_give():
    net = randomized(AddedMlps([5, 3], 64))
    coarse = torch.arange(2.0, dtype=torch.float64).view(1, 1, 1, 2).repeat(1, 5, 1, 1)
    fine = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    stretched = torch.tensor([0, 0.25, 0.75, 1], dtype=torch.float64).view(1, 1, 1, 4).repeat(1, 5, 1, 1)
    torch.testing.assert_close(net([coarse, fine]), mlp(stretched, net, 0) + mlp(fine, net, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: llava_tower("clip_bl_512_265"),
            r"name: found 'clip_bl_512_265'.* \(did you mean 'clip_bl_512_256'\?\)",
        ),
        (lambda: llava_tower("clip_bl_512_256", ["random"]), "weights: found 1, expected 2"),
        (lambda: LlavaTower([clip(32)]), "branches: found 1, expected 2"),
        (lambda: AddedMlps([32, 32], 48), "tokens of 48 numbers, expected a multiple of 32"),
        (lambda: ClipBranch("vit_tiny_patch16_224", 32), "vit_tiny_patch16_224 has no norm before its blocks"),
        (lambda: clip(32, num_heads=3), "num_heads: found 3, expected a divisor of embed_dim 64"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()
