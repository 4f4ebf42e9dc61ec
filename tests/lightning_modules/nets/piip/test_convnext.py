"""ConvNeXts as branches of pyramids."""

import re
from itertools import accumulate

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip import timm_branch
from penstock.lightning_modules.nets.piip.convnext import GROUPS, ConvNextBranch
from penstock.lightning_modules.nets.piip.interaction import State
from penstock.lightning_modules.nets.piip.pyramid import Pyramid
from penstock.lightning_modules.nets.piip.resizing import resized_image
from penstock.lightning_modules.nets.piip.vit import VitBranch

NAME = "convnext_tiny"
SHAPE = {"depths": (1, 2, 2, 1), "embed_dims": (32, 64, 64, 96)}
ALONE = {"depths": (1, 2, 2, 1), "dims": (32, 64, 64, 96), "num_classes": 0, "in_chans": 1}
ENDS = [1, 3, 3, 2]  # units of each stage


def branch(size: int = 64, groups=ENDS, **kwargs) -> ConvNextBranch:
    return ConvNextBranch(NAME, size, groups, **{"weights": "random", "in_chans": 1, **SHAPE, **kwargs})


def branch_of_vit() -> ConvNextBranch:
    return ConvNextBranch("vit_tiny_patch16_224", 64, **SHAPE)


def alone() -> nn.Module:
    """timm's model with weights that are not those of its start, where factors of blocks are nearly nothing."""
    net = timm.create_model(NAME, **ALONE).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def random_image(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def as_map(state: State) -> torch.Tensor:
    return state.tokens.transpose(1, 2).unflatten(2, state.grid)


@pytest.mark.parametrize(("name", "units"), [("convnext_tiny", 21), ("convnext_small", 39), ("convnext_base", 39)])
def test_the_papers_groups(name, units):
    with torch.device("meta"):
        one = ConvNextBranch(name, 448, weights="random")
    assert [stop - start for start, stop in one.bounds] == list(GROUPS[units])
    assert [k for start, stop in one.bounds for k in range(start, stop)] == list(range(units))
    assert [one.strides[k] for k in (0, 1, 10, 11)] == [4, 8, 16, 32]
    assert len(one.strides) == 12
    assert one.depth == units - 3
    assert one.strides[2:11] == [16] * 9
    widths = (128, 256, 512, 1024) if name == "convnext_base" else (96, 192, 384, 768)
    assert one.dims == [widths[(4, 8, 16, 32).index(stride)] for stride in one.strides]
    counts = [len(stage.blocks) + (i > 0) for i, stage in enumerate(one.stages)]  # and downsampling layers
    assert {0, *accumulate(counts[:-1])} <= {start for start, _ in one.bounds}


@pytest.mark.parametrize("second", ["convnext", "vit"])
def test_closed_gates_leave_maps_what_they_were(second):
    torch.manual_seed(0)
    net = alone()
    one = branch().double()
    one.load_pretrained(net.state_dict())
    vit = {"weights": "random", "embed_dim": 32, "depth": 4, "num_heads": 2, "in_chans": 1}
    fine = branch(128) if second == "convnext" else VitBranch("vit_tiny_patch16_224", 128, 4, **vit)
    pyramid = Pyramid([one, fine]).double().eval()
    image = random_image(2, 1, 128, 192)
    last, maps = net.forward_intermediates(resized_image(image, 0.5))
    found = [states[0] for states in pyramid(image, range(4))]
    for state, expected in zip(found, maps):
        assert (as_map(state) - expected).abs().max() < 1e-10
    assert (as_map(found[-1]) - last).abs().max() < 1e-10
    assert last.abs().max() > 0.1
    for name, parameter in pyramid.named_parameters():
        if name.endswith("_gate"):
            nn.init.normal_(parameter)
    assert (pyramid(image)[0][0].tokens - found[-1].tokens).abs().max() > 1e-3


def test_groups_within_and_across_stages():
    torch.manual_seed(0)
    net = alone()
    one = branch(groups=[2, 1, 3, 3]).double().eval()
    one.load_pretrained(net.state_dict())
    assert (one.strides, one.dims) == ([8, 8, 16, 32], [64, 64, 64, 96])
    image = random_image(1, 1, 64, 64)
    state = one.embed(image)
    for group in range(4):
        state = one.run(group, state)
    assert (as_map(state) - net.forward_features(image)).abs().max() < 1e-10


def test_two_groups_of_a_multimodal_model():
    with torch.device("meta"):
        one = ConvNextBranch("convnext_base", 640, [20, 19], "random")
    assert (one.strides, one.dims) == ([16, 32], [512, 1024])


def test_grids_of_images_that_cells_do_not_divide():
    one = branch()
    state = one.embed(torch.rand(1, 1, 75, 110))
    assert state.grid == (18, 27)
    for group, grid in enumerate([(18, 27), (9, 13), (4, 6), (2, 3)]):
        state = one.run(group, state)
        assert state.grid == grid == (75 // one.strides[group], 110 // one.strides[group])
        assert state.tokens.shape == (1, grid[0] * grid[1], one.dims[group])


def test_tokens_are_row_by_row():
    one = branch()
    image = torch.rand(1, 1, 16, 24)
    corner = one.embed(image[:, :, 4:8, 8:12]).tokens[0, 0]
    assert (one.embed(image).tokens[0, 6 + 2] - corner).abs().max() < 1e-6


def test_drop_path_is_linear_over_all_blocks():
    one = branch(drop_path=0.5)
    blocks = [block for stage in one.stages for block in stage.blocks]
    assert [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    )


def test_there_is_no_attention():
    assert branch().attention_operations((64, 64)) == 0


def of_transformers(name: str) -> str:
    """A timm name in transformers' `ConvNextForImageClassification`."""
    for pattern, other in {
        r"^stem\.0\.": "convnext.embeddings.patch_embeddings.",
        r"^stem\.1\.": "convnext.embeddings.layernorm.",
        r"^stages\.(\d)\.downsample\.": r"convnext.encoder.stages.\1.downsampling_layer.",
        r"^stages\.(\d)\.blocks\.(\d)\.norm\.": r"convnext.encoder.stages.\1.layers.\2.layernorm.",
        r"^stages\.(\d)\.blocks\.(\d)\.conv_dw\.": r"convnext.encoder.stages.\1.layers.\2.dwconv.",
        r"^stages\.(\d)\.blocks\.(\d)\.mlp\.fc(\d)\.": r"convnext.encoder.stages.\1.layers.\2.pwconv\3.",
        r"^stages\.(\d)\.blocks\.(\d)\.gamma$": r"convnext.encoder.stages.\1.layers.\2.layer_scale_parameter",
        r"^head\.norm\.": "convnext.layernorm.",
        r"^head\.fc\.": "classifier.",
    }.items():
        if re.search(pattern, name):
            return re.sub(pattern, other, name)
    raise AssertionError(name)


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_weights_from_a_file(form, tmp_path):
    torch.manual_seed(0)
    net = timm.create_model(NAME, **ALONE | {"num_classes": 10})
    state = net.state_dict()
    if form == "transformers":
        state = {of_transformers(name): value for name, value in state.items()}
    save_file(state, tmp_path / "weights.safetensors")
    one = branch(weights=str(tmp_path / "weights.safetensors"))
    one.load()
    for name, value in one.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_weights_of_the_hub(monkeypatch):
    torch.manual_seed(0)
    net, asked = timm.create_model(NAME, **ALONE), []
    one = branch(weights="hub")
    monkeypatch.setattr(timm_branch.timm, "create_model", lambda *a, **k: asked.append((a, k)) or net)
    one.load()
    assert asked == [((NAME,), {"pretrained": True})]
    assert torch.equal(one.stages[3].blocks[0].conv_dw.weight, net.stages[3].blocks[0].conv_dw.weight)


def test_random_weights_stay():
    one = branch()
    before = one.stem[0].weight.clone()
    one.load()
    assert torch.equal(one.stem[0].weight, before)


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model(NAME, **ALONE | {"dims": (32, 64, 64, 128)}).state_dict(), file)
    with pytest.raises(UserError, match=r"do not fit convnext_tiny: stages.3.* has shape .*128.*, expected .*96"):
        branch(weights=str(file)).load()
    save_file({"conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"do not fit convnext_tiny: Missing key"):
        branch(weights=str(file)).load()


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"timm has no 'convnext_tinny'.*convnext_tiny", lambda: ConvNextBranch("convnext_tinny", 64)),
        (r"resnet18 is a ResNet, expected one of timm's ConvNeXts", lambda: ConvNextBranch("resnet18", 64)),
        (r"vit_tiny_patch16_224 is none of timm's ConvNeXts", branch_of_vit),
        (r"groups: found none for the 15 units of convnext_atto", lambda: ConvNextBranch("convnext_atto", 64)),
        (r"groups: found \[3, 4\] of 7 units, expected all 9", lambda: branch(groups=[3, 4])),
        (r"groups: found \[9, 0\], expected at least one unit", lambda: branch(groups=[9, 0])),
        (r"groups: found 2, expected a divisor of the 9 units", lambda: branch(groups=2)),
        (r"size: found 24, expected 32 or more, the stride of convnext_tiny", lambda: branch(24)),
        (r"no weights file .*none.pth", lambda: branch(weights="none.pth").load()),
    ],
)
def test_refused(message, make):
    with pytest.raises(UserError, match=message):
        make()
