"""Closed-form properties of pyramids, branches and their weights."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from penstock.lightning_modules.callbacks.perf import checkpoint_activations
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.classifier import PiipClassifier
from penstock.lightning_modules.nets.piip.cross_attention import DeformableAttention, directions
from penstock.lightning_modules.nets.piip.dense import PiipBackbone
from penstock.lightning_modules.nets.piip.interaction import ConvFfn, InteractionUnit, State
from penstock.lightning_modules.nets.piip.presets import classifier, dense
from penstock.lightning_modules.nets.piip.pyramid import Pyramid
from penstock.lightning_modules.nets.piip.resizing import resized_image, resized_kernel, resized_table
from penstock.lightning_modules.nets.piip.vit import VitBranch
from penstock.lightning_modules.nets.piip.window_attention import attend

NAME = "deit_tiny_patch16_224"


def branch(size: int, dim: int = 32, groups=2, **kwargs) -> VitBranch:
    depth = groups if isinstance(groups, int) else sum(groups)
    kwargs = {"weights": "random", "embed_dim": dim, "depth": depth, "num_heads": 2, "in_chans": 1, **kwargs}
    return VitBranch(NAME, size, groups, **kwargs)


def opened(net: torch.nn.Module) -> torch.nn.Module:
    """The network with random gates."""
    for name, parameter in net.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.normal_(parameter)
    return net


def pair(**kwargs) -> Pyramid:
    return Pyramid([branch(32, 64, **kwargs), branch(64, 32, **kwargs)]).double().eval()


def random_image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("window", [None, 14])
def test_closed_gates_leave_a_classifier_what_it_was(window):
    torch.manual_seed(0)
    alone = timm.create_model(NAME, embed_dim=32, depth=4, num_heads=2, in_chans=1, num_classes=7).double().eval()
    own = {"num_classes": 7, "class_token": True, "layer_scale": None}
    one, other = (branch(size, depth=4, **own).double() for size in (224, 448))
    one.load_pretrained(alone.state_dict())
    net = PiipClassifier([one, other], 7).double().eval()
    image = random_image(2, 1, 448, 448)
    state = net.pyramid(image)[0][0]
    found = one.head(one.norm(state.cls[:, 0]))
    assert (found - alone(resized_image(image, 0.5))).abs().max() < 1e-10
    assert (opened(net).pyramid(image)[0][0].tokens - state.tokens).abs().max() > 1e-3


def test_a_window_as_large_as_the_grid_is_none():
    torch.manual_seed(0)
    block = branch(80).blocks[0].double()
    x, grid = torch.randn(2, 25, 32, dtype=torch.float64), (5, 5)
    whole = attend(block.attn, x, grid, None)
    for pad in ("inputs", "projections"):
        assert (attend(block.attn, x, grid, 5, pad) - whole).abs().max() < 1e-12
        assert (attend(block.attn, x, grid, 3, pad) - whole).abs().max() > 1e-3


def test_points_start_on_square_rings():
    half = 2**0.5 - 1
    first = torch.tensor([(1, 0), (1, half), (1, 1), (half, 1), (0, 1)])
    found = directions(16, 4)
    for p in range(4):
        assert (found[:5, p] - first * (p + 1)).abs().max() < 1e-6


def test_deformable_attention_without_offsets_reads_its_own_cell():
    torch.manual_seed(0)
    attn = DeformableAttention(8, 8, heads=1, points=1, value_ratio=1.0).double()
    torch.nn.init.zeros_(attn.sampling_offsets.bias)
    query, feat = (torch.randn(2, 20, 8, dtype=torch.float64) for _ in range(2))
    found = attn(query, (4, 5), feat, (4, 5))
    assert (found - attn.output_proj(attn.value_proj(feat))).abs().max() < 1e-12
    assert attn.attention_weights(query).softmax(-1).eq(1).all()


def test_only_gates_learn_at_first():
    torch.manual_seed(0)
    net = pair()
    sum(state.tokens.square().sum() for state in net(random_image(1, 1, 64, 64))[0]).backward()
    seen = {True: 0, False: 0}
    for name, parameter in net.interactions.named_parameters():
        gate = name.endswith("_gate")
        seen[gate] += 1
        assert parameter.grad.ne(0).any() == gate, name
    assert all(seen.values())


def test_fine_features_reach_all_branches_at_once_and_coarse_ones_step_by_step():
    torch.manual_seed(0)
    net = opened(Pyramid([branch(32), branch(48), branch(64)])).double().eval()
    tokens = [torch.randn(1, n * n, 32, dtype=torch.float64) for n in (2, 3, 4)]

    def after(count: int, changed: int) -> list[torch.Tensor]:
        states = [State(x + (i == changed), (n, n)) for i, (x, n) in enumerate(zip(tokens, (2, 3, 4)))]
        for interaction in list(net.interactions)[:count]:
            states = interaction(states)
        return [state.tokens for state in states]

    for count in (1, 2):
        before, coarse, fine = after(count, -1), after(count, 0), after(count, 2)
        assert not torch.equal(fine[0], before[0])
        assert torch.equal(coarse[2], before[2]) == (count == 1)


def test_both_directions_read_what_was_before():
    torch.manual_seed(0)
    unit = opened(InteractionUnit(64, 32)).double().eval()
    coarse = State(torch.randn(1, 4, 64, dtype=torch.float64), (2, 2))
    fine = State(torch.randn(1, 9, 32, dtype=torch.float64), (3, 3))
    of_fine = unit.to_fine(coarse.tokens)
    assert torch.equal(unit(coarse, fine)[1].tokens, unit.fine(fine.tokens, (3, 3), of_fine, (2, 2)))


def test_conv_ffn_is_two_layers_around_a_depthwise_convolution():
    torch.manual_seed(0)
    ffn = ConvFfn(8, 0.5).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    inner = torch.nn.functional.pad(ffn.fc1(x).reshape(2, 3, 4), (0, 0, 1, 1, 1, 1))
    kernel = ffn.conv.weight[:, 0].permute(1, 2, 0)
    cells = [(inner[i : i + 3, j : j + 3] * kernel).sum((0, 1)) + ffn.conv.bias for i in range(2) for j in range(3)]
    expected = ffn.fc2(torch.nn.functional.gelu(torch.stack(cells)))
    assert (ffn(x, (2, 3))[0] - expected).abs().max() < 1e-12


def test_resizing_to_the_same_is_nothing():
    x = torch.rand(1, 16, 5)
    kernel, image = torch.rand(3, 2, 16, 16), torch.rand(1, 1, 6, 6)
    assert resized_table(x, (4, 4)) is x
    assert resized_kernel(kernel, 16) is kernel
    assert resized_image(image, 1.0) is image


@pytest.mark.parametrize("size", [(128, 128), (64, 160)])
def test_maps_of_a_dense_backbone(size):
    net = PiipBackbone([branch(64, 64), branch(128, 32)]).eval()
    maps = net(torch.rand(1, 1, *size))
    assert [tuple(y.shape) for y in maps] == [(1, 64, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert net.merge(net.pyramid(torch.rand(1, 1, *size))[0]).shape[2:] == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize(("rule", "rates"), [("constant", [0.3] * 4), ("linear", [0, 0.1, 0.2, 0.3])])
def test_drop_path_of_blocks(rule, rates):
    one = branch(32, groups=4, drop_path=0.3, drop_path_rule=rule)
    found = [(block.drop_path1.drop_prob, block.drop_path2.drop_prob) for block in one.blocks]
    assert found == [pytest.approx((rate, rate)) for rate in rates]


@pytest.mark.parametrize("form", ["timm", "deit"])
def test_weights_from_a_file(form, tmp_path):
    torch.manual_seed(0)
    own = {"embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": 1, "init_values": 0.1}
    alone = timm.create_model(NAME, patch_size=14, img_size=112, num_classes=1000, **own)
    state = alone.state_dict()
    for name in list(state):
        if form == "deit" and ".ls" in name:
            state[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = state.pop(name) + 1
    save_file(state, tmp_path / "weights.safetensors")
    one = branch(96, weights=str(tmp_path / "weights.safetensors"), num_classes=10, class_token=True)
    before = one.head.weight.clone()
    one.load()
    assert torch.equal(one.blocks[1].ls2.gamma, torch.full((32,), 1.1 if form == "deit" else 0.1))
    assert torch.equal(one.cls_token, alone.cls_token + alone.pos_embed[:, :1])
    assert torch.equal(one.pos_embed, resized_table(alone.pos_embed[:, 1:], (14, 14)))
    assert torch.equal(one.patch_embed.weight, resized_kernel(alone.patch_embed.proj.weight, 16))
    assert torch.equal(one.norm.weight, alone.norm.weight)
    assert torch.equal(one.head.weight, before)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (
            r"timm has no 'deit_tinny_patch16_224'.*deit_tiny_patch16_224",
            lambda: VitBranch("deit_tinny_patch16_224", 32),
        ),
        (r"resnet18 is none of timm's VisionTransformers", lambda: VitBranch("resnet18", 32)),
        (r"size: found 40, expected a multiple of the patch of 16 pixels, such as 32", lambda: branch(40)),
        (r"groups: found 3, expected a divisor of the 4 blocks", lambda: branch(32, groups=3, depth=4)),
        (r"groups: found \[2, 0\], expected at least one block in each", lambda: branch(32, groups=[2, 0])),
        (r"groups: found \[1, 1\] of 2 blocks, expected all 4", lambda: branch(32, groups=[1, 1], depth=4)),
        (r"num_heads: found 3, expected a divisor of embed_dim 32", lambda: branch(32, num_heads=3)),
        (r"heads: found 16, expected a divisor of 24", lambda: Pyramid([branch(32, 48), branch(64, 48)])),
        (r"sizes \[64, 32\], expected \[32, 64\]", lambda: Pyramid([branch(64), branch(32)])),
        (r"found \[2, 1\] groups of blocks", lambda: Pyramid([branch(32), branch(64, groups=1)])),
        (r"branches\[0\]: expected num_classes=3", lambda: PiipClassifier([branch(32)], 3)),
        (r"models: found TX, expected some of T, S, B for", lambda: classifier("TX", (64, 32), 3)),
        (r"sizes: found 1, expected 2, one for each of models=TS", lambda: dense("TS", (64,))),
        (r"no weights file .*none.pth", lambda: branch(32, weights="none.pth").load()),
    ],
)
def test_refused(message, make):
    with pytest.raises(UserError, match=message):
        make()


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model(NAME, embed_dim=48, depth=2, num_heads=2, in_chans=1).state_dict(), file)
    with pytest.raises(UserError, match=r"do not fit deit_tiny_patch16_224: .* has shape .*48.*, expected .*32"):
        branch(32, weights=str(file)).load()
    save_file({"conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"'patch_embed.weight' is missing; expected the state dict of deit_tiny"):
        branch(32, weights=str(file)).load()


def test_a_reversed_order_is_warned_of(recwarn):
    Pyramid([branch(32, 32), branch(64, 64)])
    text = str(recwarn[0].message)
    assert "models of 0.04, 0.129 million parameters on images of 32, 64 pixels" in text
    assert text.endswith(": 0.129, 0.04")
    Pyramid([branch(32, 64), branch(64, 32)])
    assert len(recwarn) == 1


def test_branches_without_interactions_are_those_with_closed_gates():
    torch.manual_seed(0)
    closed = pair()
    alone = Pyramid(list(closed.branches), unit=None)
    image = random_image(1, 1, 64, 64)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(closed(image)[0], alone(image)[0]))
    assert not list(alone.interactions.parameters())


@pytest.mark.parametrize("window", [None, 2])
def test_blocks_are_called_as_modules_and_can_recompute(window):
    """So that shards are gathered and activations recomputed for them, in windows too."""
    torch.manual_seed(0)
    branch = VitBranch("vit_tiny_patch16_224", 64, 2, "random", window=window, embed_dim=32, depth=2, num_heads=2)
    names, image = list(branch.state_dict()), torch.rand(1, 3, 64, 64)

    def run():
        branch.zero_grad()
        state = branch.embed(image)
        for group in range(2):
            state = branch.run(group, state)
        state.tokens.square().sum().backward()
        return state.tokens.detach(), [p.grad.clone() for p in branch.parameters() if p.grad is not None]

    expected, called = run(), []
    for block in branch.blocks:
        block.norm1.register_forward_hook(lambda *_: called.append(1))
    checkpoint_activations(nn.ModuleList([branch]))
    found = run()
    assert len(called) == 4  # forward and again in backward
    torch.testing.assert_close(found, expected)
    assert list(branch.state_dict()) == names
