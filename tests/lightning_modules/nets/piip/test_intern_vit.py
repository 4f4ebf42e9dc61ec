"""InternViT-6B as a branch of pyramids."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.intern_vit import HUB, HeadsNorm, InternVitBranch
from penstock.lightning_modules.nets.piip.pyramid import Pyramid
from penstock.lightning_modules.nets.piip.resizing import resized_image, resized_kernel, resized_table

SHAPE = {"embed_dim": 32, "depth": 4, "num_heads": 2, "in_chans": 1}


def branch(size: int = 64, groups=2, **kwargs) -> InternVitBranch:
    return InternVitBranch(size, groups, **{"weights": "random", **SHAPE, **kwargs})


def disturbed(net: nn.Module) -> nn.Module:
    """In double precision, no parameter where it starts."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net.double().eval()


def random_image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attention(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of tokens `(N, D)`: queries and keys are normed over all D channels, then split."""
    q, k, v = (x @ weight.T for weight in attn.qkv.weight.chunk(3))
    q, k = rms(q, attn.q_norm.weight), rms(k, attn.k_norm.weight)
    width = x.shape[1] // attn.num_heads
    heads = [
        (a @ b.T / width**0.5).softmax(1) @ c
        for a, b, c in zip(q.split(width, 1), k.split(width, 1), v.split(width, 1))
    ]
    return torch.cat(heads, 1) @ attn.proj.weight.T + attn.proj.bias


def by_hand(one: InternVitBranch, image: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The model's tokens of one image, by its formulas."""
    cells = F.conv2d(image[None], one.patch_embed.weight, one.patch_embed.bias, stride=16)[0]
    _, height, width = cells.shape
    x = cells.flatten(1).T + resized_table(one.pos_embed, (height, width))[0]
    for block in one.blocks:
        y = rms(x, block.norm1.weight)
        if window is None:
            y = attention(block.attn, y)
        else:
            padded = F.pad(y.reshape(height, width, -1), (0, 0, 0, -width % window, 0, -height % window))
            out = torch.zeros_like(padded)
            for i in range(0, height, window):
                for j in range(0, width, window):
                    part = padded[i : i + window, j : j + window]
                    out[i : i + window, j : j + window] = attention(block.attn, part.flatten(0, 1)).reshape(part.shape)
            y = out[:height, :width].flatten(0, 1)
        x = x + block.ls1.gamma * y
        y = F.gelu(rms(x, block.norm2.weight) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        x = x + block.ls2.gamma * (y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
    return x


@pytest.mark.parametrize("window", [None, 3])
def test_the_model_by_hand(window):
    one = disturbed(branch(window=window))
    image = random_image(2, 1, 64, 80)
    state = one.embed(image)
    for group in range(2):
        state = one.run(group, state)
    assert state.grid == (4, 5)
    for found, x in zip(state.tokens, image):
        assert (found - by_hand(one, x, window)).abs().max() < 1e-10


def test_closed_gates_leave_the_model_what_it_was():
    pyramid = Pyramid([branch(), branch(128)])
    disturbed(pyramid.branches)
    pyramid.double().eval()
    image = random_image(1, 1, 128, 128)
    found = pyramid(image)[0][0].tokens
    assert (found[0] - by_hand(pyramid.branches[0], resized_image(image, 0.5)[0])).abs().max() < 1e-10
    for name, parameter in pyramid.named_parameters():
        if name.endswith("_gate"):
            nn.init.normal_(parameter)
    assert (pyramid(image)[0][0].tokens - found).abs().max() > 1e-3


def test_a_norm_over_all_heads_is_none_of_each():
    norm = HeadsNorm(32, eps=1e-6).double()
    x = torch.randn(2, 4, 3, 8, dtype=torch.float64) * torch.tensor([1, 2, 3, 4.0])[:, None, None]
    squares = norm(x).square()
    assert (squares.mean((1, 3)) - 1).abs().max() < 1e-5
    assert (squares.mean(3) - 1).abs().max() > 0.1


def test_the_whole_model_on_the_meta_device():
    with torch.device("meta"):
        one = InternVitBranch(512, weights="random")
        state = one.embed(torch.empty(1, 3, 512, 512))
        for group in range(12):
            state = one.run(group, state)
    dim = 3200
    block = 12 * dim * dim + (1 + 4 + 1) * dim + 6 * dim  # layers, their biases; norms and factors
    embedding = 3 * 16 * 16 * dim + dim + 14 * 14 * dim
    assert sum(parameter.numel() for parameter in one.parameters()) == 48 * block + embedding
    assert (state.grid, state.tokens.shape) == ((32, 32), (1, 1024, dim))
    assert (one.dims, one.strides) == ([dim] * 12, [16] * 12)
    assert [stop - start for start, stop in one.bounds] == [4] * 12
    assert one.blocks[0].attn.q_norm.weight.shape == (dim,)
    assert one.blocks[0].attn.num_heads == 25
    assert one.blocks[0].attn.qkv.bias is None


def test_start():
    one = branch(drop_path=0.3)
    assert [block.drop_path2.drop_prob for block in one.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(block.ls1.gamma.eq(0.1).all() for block in one.blocks)
    assert one.blocks[0].norm1.eps == one.blocks[0].attn.k_norm.eps == 1e-6


def official() -> dict[str, torch.Tensor]:
    """The authors' file: patches of 14, a class token and its position, and what a branch has no use for."""
    state = {}
    for name, value in disturbed(branch()).float().state_dict().items():
        state[name.replace("patch_embed.", "patch_embed.proj.")] = value
    state["patch_embed.proj.weight"] = torch.randn(32, 1, 14, 14)
    state["pos_embed"] = torch.randn(1, 257, 32)
    return state | {"cls_token": torch.randn(1, 1, 32), "clip_projector.norm1_q.weight": torch.randn(32)}


def check(one: InternVitBranch, state: dict[str, torch.Tensor]) -> None:
    assert torch.equal(one.patch_embed.weight, resized_kernel(state["patch_embed.proj.weight"], 16))
    assert torch.equal(one.pos_embed, resized_table(state["pos_embed"][:, 1:], (14, 14)))
    for name in ("blocks.3.ls2.gamma", "blocks.2.attn.q_norm.weight", "blocks.0.attn.qkv.weight"):
        assert torch.equal(one.get_parameter(name), state[name])


def test_weights_from_a_file(tmp_path):
    state = official()
    save_file(state, tmp_path / "weights.safetensors")
    one = branch(weights=str(tmp_path / "weights.safetensors"))
    one.load()
    check(one, state)


def test_weights_of_the_hub(tmp_path, monkeypatch):
    state, asked = official(), []
    torch.save(state, tmp_path / "weights.pth")

    def download(*which: str) -> str:
        asked.append(which)
        return str(tmp_path / "weights.pth")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    one = branch(weights="hub")
    one.load()
    assert asked == [HUB]
    check(one, state)


def test_weights_of_another_model_are_refused(tmp_path):
    file, state = tmp_path / "weights.safetensors", official()
    save_file(state, file)
    with pytest.raises(UserError, match=r"do not fit InternViT-6B: .* has shape .*32.*, expected .*64"):
        branch(weights=str(file), embed_dim=64).load()
    del state["blocks.3.attn.q_norm.weight"]
    save_file(state, file)
    with pytest.raises(UserError, match=r"do not fit InternViT-6B: Missing key.*blocks.3.attn.q_norm.weight"):
        branch(weights=str(file)).load()


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"size: found 40, expected a multiple of the patch of 16 pixels, such as 32", lambda: branch(40)),
        (r"groups: found 3, expected a divisor of the 4 blocks of InternViT-6B", lambda: branch(groups=3)),
        (r"num_heads: found 25, expected a divisor of embed_dim 32", lambda: branch(num_heads=25)),
        (r"no weights file .*none.pth", lambda: branch(weights="none.pth").load()),
    ],
)
def test_refused(message, make):
    with pytest.raises(UserError, match=message):
        make()
