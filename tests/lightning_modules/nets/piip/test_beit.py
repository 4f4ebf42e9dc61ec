"""BEiTs as branches of pyramids."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import gen_relative_position_index
from torch import nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.beit import (
    BeitBranch,
    BiasedAttention,
    relative_positions,
    resized_biases,
)
from penstock.lightning_modules.nets.piip.pyramid import Pyramid
from penstock.lightning_modules.nets.piip.resizing import resized_image
from penstock.lightning_modules.nets.piip.window_attention import attend

NAME = "beitv2_base_patch16_224"
SHAPE = {"embed_dim": 32, "depth": 4, "num_heads": 2}


def branch(size: int = 64, groups=2, **kwargs) -> BeitBranch:
    return BeitBranch(NAME, size, groups, **{"weights": "random", "in_chans": 1, "window": 4, **SHAPE, **kwargs})


def alone(cells: int, **kwargs) -> nn.Module:
    """timm's model of images of some cells, none of whose weights are 0."""
    torch.manual_seed(0)
    shape = {"in_chans": 1, "num_classes": 5, **SHAPE, **kwargs}
    net = timm.create_model(NAME, img_size=16 * cells, init_values=0.1, **shape).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def random_image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def test_closed_gates_leave_a_model_what_it_was():
    """But for the class token, which nothing attends to here: its bias is minus infinity."""
    net = alone(4)
    for block in net.blocks:
        block.attn.relative_position_bias_table.data[-2] = -torch.inf
    one = branch().double()
    one.load_pretrained(net.state_dict())
    pyramid = Pyramid([one, branch(128)]).double().eval()
    image = random_image(2, 1, 128, 128)
    found = pyramid(image)[0][0].tokens
    expected = net.forward_features(resized_image(image, 0.5))[:, 1:]
    assert (found - expected).abs().max() < 1e-10
    assert expected.abs().max() > 0.1
    for name, parameter in pyramid.named_parameters():
        if name.endswith("_gate"):
            nn.init.normal_(parameter)
    assert (pyramid(image)[0][0].tokens - found).abs().max() > 1e-3


def by_hand(attn: BiasedAttention, x: torch.Tensor, grid, window: int) -> torch.Tensor:
    """Attention of each cell of one image to the cells of its window, those beyond the edge being zeros."""
    (height, width), dim, heads = grid, x.shape[-1], attn.num_heads
    weights, table = attn.qkv.weight.chunk(3), attn.relative_position_bias_table
    side, out = 2 * window - 1, torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            top, left = i - i % window, j - j % window
            cells = [(a, b) for a in range(top, top + window) for b in range(left, left + window)]
            near = torch.stack([x[a * width + b] if a < height and b < width else x.new_zeros(dim) for a, b in cells])
            rows = [(i - a + window - 1) * side + (j - b + window - 1) for a, b in cells]
            q = (weights[0] @ x[i * width + j] + attn.q_bias).reshape(heads, -1)
            k, v = near @ weights[1].T, near @ weights[2].T + attn.v_bias
            parts = []
            for m, (k_m, v_m) in enumerate(zip(k.chunk(heads, 1), v.chunk(heads, 1))):
                scores = k_m @ q[m] / (dim / heads) ** 0.5 + table[rows, m]
                parts.append(scores.softmax(0) @ v_m)
            out[i * width + j] = attn.proj(torch.cat(parts))
    return out


@pytest.mark.parametrize(("grid", "window"), [((4, 4), 2), ((5, 3), 2), ((2, 3), 4)])
def test_attention_in_windows(grid, window):
    torch.manual_seed(0)
    attn = BiasedAttention(12, 3, window).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, grid[0] * grid[1], 12, dtype=torch.float64)
    found = attend(attn, x, grid, window, "inputs")
    for one, image in zip(found, x):
        assert (one - by_hand(attn, image, grid, window)).abs().max() < 1e-12


def test_blocks_attend_in_windows_of_their_normed_inputs():
    torch.manual_seed(0)
    one = branch(groups=4, window=3).double().eval()
    for parameter in one.parameters():
        nn.init.normal_(parameter, std=0.3)
    block, state = one.blocks[1], one.embed(random_image(1, 1, 64, 80))
    assert state.grid == (4, 5)
    x = state.tokens
    x = x + block.ls1.gamma * by_hand(block.attn, block.norm1(x)[0], (4, 5), 3)
    x = x + block.ls2.gamma * block.mlp(block.norm2(x))
    assert (one.run(1, state).tokens - x).abs().max() < 1e-12


def test_rows_of_the_table_are_timms():
    assert torch.equal(relative_positions(5), gen_relative_position_index((5, 5))[1:, 1:])


def test_a_table_of_the_same_window_is_as_it_was():
    table = torch.randn(7 * 7 + 3, 2)
    assert torch.equal(resized_biases(table, 4), table[:-3])
    assert torch.equal(resized_biases(table[:-3], 4), table[:-3])


@pytest.mark.parametrize("window", [20, 28])
def test_tables_are_splines_over_geometric_distances(window):
    """A polynomial of third degree in each place's distance stays what it is."""
    ratio, end = 1.05, window - 1
    for _ in range(100):  # sum of 13 terms
        ratio = (1 + end * (ratio - 1)) ** (1 / 13)
    half = [sum(ratio**k for k in range(i)) for i in range(14)]
    assert half[-1] == pytest.approx(end)
    places = torch.tensor([-x for x in half[:0:-1]] + half, dtype=torch.float64)
    at = torch.arange(-end, end + 1, dtype=torch.float64)

    def surface(x: torch.Tensor) -> torch.Tensor:
        x = x / end
        head = (x**3 - x)[:, None] * (1 + x**2)[None] + x[None]
        return torch.stack([head, head.T + 2], -1).flatten(0, 1)

    table = torch.cat([surface(places), torch.zeros(3, 2, dtype=torch.float64)])
    assert (resized_biases(table, window) - surface(at)).abs().max() < 1e-3


RECORDED = [  # of the official loading code in double precision
    (14, 28, [4.053980574009002e-17, -0.125708873801901, -0.8011345951780413, -0.9570310167765015]),
    (8, 20, [-7.300126430931689e-06, -0.46761557386923547, -0.9705134889047495, 0.4792429930448648]),
]


def test_recorded_tables():
    for before, after, recorded in RECORDED:
        i = torch.arange((2 * before - 1) ** 2 * 2)
        table = torch.sin((i * i % 1009).double()).reshape(-1, 2)
        found = resized_biases(table, after)
        assert found.shape == ((2 * after - 1) ** 2, 2)
        assert found.flatten()[:: 2 * after * after].tolist() == pytest.approx(recorded, abs=1e-9)


def test_drop_path_is_linear():
    one = branch(drop_path=0.3)
    assert [block.drop_path1.drop_prob for block in one.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_operations_of_windows():
    assert branch(window=3).attention_operations((64, 80)) == 4 * 2 * 20 * 9 * 32


def test_weights_from_a_file(tmp_path):
    net = alone(14)
    save_file(net.float().state_dict(), tmp_path / "weights.safetensors")
    one = branch(window=20, weights=str(tmp_path / "weights.safetensors"))
    one.load()
    for k, block in enumerate(net.blocks):
        found = one.blocks[k]
        assert torch.equal(found.ls1.gamma, block.gamma_1)
        assert torch.equal(found.ls2.gamma, block.gamma_2)
        assert torch.equal(found.attn.q_bias, block.attn.q_bias)
        assert torch.equal(found.attn.v_bias, block.attn.v_bias)
        assert torch.equal(found.mlp.fc1.weight, block.mlp.fc1.weight)
        table = resized_biases(block.attn.relative_position_bias_table.detach(), 20)
        assert torch.equal(found.attn.relative_position_bias_table, table)
    assert torch.equal(one.patch_embed.weight, net.patch_embed.proj.weight)
    assert "cls_token" not in one.state_dict()


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(alone(4, embed_dim=48).state_dict(), file)
    with pytest.raises(UserError, match=r"do not fit beitv2_base_patch16_224: .* has shape .*48.*, expected .*32"):
        branch(weights=str(file)).load()
    save_file(alone(4, num_heads=4).state_dict(), file)
    with pytest.raises(UserError, match=r"relative_position_bias_table has shape \[49, 4\], expected \[49, 2\]"):
        branch(weights=str(file)).load()
    vit = timm.create_model("vit_tiny_patch16_224", in_chans=1, **SHAPE)
    save_file(vit.state_dict(), file)
    with pytest.raises(UserError, match=r"do not fit beitv2_base_patch16_224: Missing key.*q_bias"):
        branch(weights=str(file)).load()


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"timm has no 'beitv2_bsae_patch16_224'.*beitv2_base", lambda: BeitBranch("beitv2_bsae_patch16_224", 64)),
        (r"resnet18 is none of timm's Beits", lambda: BeitBranch("resnet18", 64, depth=2)),
        (r"deit3_small_patch16_224 is a VisionTransformer", lambda: BeitBranch("deit3_small_patch16_224", 64)),
        (r"size: found 40, expected a multiple of the patch of 16 pixels, such as 32", lambda: branch(40)),
        (r"groups: found 3, expected a divisor of the 4 blocks", lambda: branch(groups=3)),
        (r"num_heads: found 3, expected a divisor of embed_dim 32", lambda: branch(num_heads=3)),
        (r"no weights file .*none.pth", lambda: branch(weights="none.pth").load()),
    ],
)
def test_refused(message, make):
    with pytest.raises(UserError, match=message):
        make()
