"""EfficientNets and MobileNets as branches of pyramids."""

from itertools import accumulate

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from penstock.lightning_modules.cli.flops import run_flops
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.efficientnet import EfficientNetBranch, efficientnet_backbone

NAME = "mobilenetv2_035"
BLOCKS = [1, 2, 3, 4, 3, 3, 1]


def branch(size: int = 64, stages: int = 5, groups=(6, 4, 3), **kwargs) -> EfficientNetBranch:
    return EfficientNetBranch(NAME, size, stages, groups, **{"weights": "random", **kwargs})


def as_map(state) -> torch.Tensor:
    return state.tokens.transpose(1, 2).unflatten(2, state.grid)


def shaken(net: nn.Module) -> nn.Module:
    """With running statistics that are not those of the start."""
    for name, value in net.named_buffers():
        if name.endswith(("mean", "var")):
            nn.init.uniform_(value, 0.5, 2)
    return net


@pytest.mark.parametrize("pad_type", [None, "same"])
def test_maps_are_those_of_timms_stages(tmp_path, pad_type):
    torch.manual_seed(0)
    options = {"pad_type": pad_type} if pad_type else {}
    net = shaken(timm.create_model(NAME, **options)).eval()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    one = branch(stages=7, groups=BLOCKS, weights=str(tmp_path / "net.safetensors"), pad_type=pad_type)
    one.load()
    image = torch.rand(2, 3, 75, 110) * 2 - 1
    x, state = net.bn1(net.conv_stem(image)), one.embed(image)
    assert one.strides == [2, 4, 8, 16, 16, 32, 32]
    for group, stage in enumerate(net.blocks):
        x, state = stage(x), one.run(group, state)
        assert (as_map(state) - x).abs().max() < 1e-6 * x.abs().max()
        assert one.dims[group] == x.shape[1]
        assert state.grid == x.shape[2:]
    with torch.no_grad():
        net.blocks[6][0].conv_pwl.weight[3] += 1
    assert (as_map(state) - net.blocks(net.bn1(net.conv_stem(image)))).abs().max() > 1e-3


def test_groups_and_stages_left_out():
    one = branch()
    assert (one.depth, one.strides) == (13, [8, 16, 16])
    assert sum(len(stage) for stage in one.blocks) == 13
    ends = [*accumulate(BLOCKS)]
    assert one.bounds == [(0, ends[2]), (6, 10), (10, ends[4])]


def test_norms_stand_still_and_first_stages_do_not_train():
    torch.manual_seed(0)
    one = branch(frozen=2).train()
    before = {name: value.clone() for name, value in one.named_buffers()}
    state = one.embed(torch.rand(2, 3, 64, 64))
    for group in range(3):
        state = one.run(group, state)
    state.tokens.square().mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in one.named_buffers())
    frozen = {name for name, value in one.named_parameters() if value.grad is None}
    assert frozen == {
        name for name, _ in one.named_parameters() if name.startswith(("conv_stem", "bn1", "blocks.0", "blocks.1."))
    }
    assert all(value.requires_grad for value in branch(frozen=0).parameters())


def test_norms_that_train_take_the_statistics_of_batches():
    one = branch(frozen=2, norm_eval=False).train()
    before = {name: value.clone() for name, value in one.named_buffers()}
    one.run(2, one.run(1, one.run(0, one.embed(torch.rand(2, 3, 64, 64)))))
    moved = {name.split(".")[1] for name, value in one.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {"2", "3", "4"}


def test_a_backbone_costs_no_more_than_its_larger_branch_alone():
    kwargs = {"weights": "random", "pad_type": "same"}
    both = efficientnet_backbone("mobilenetv2_100", [128, 320], [5, 4], [[6, 4, 3], [6, 2, 2]], **kwargs)
    alone = efficientnet_backbone("mobilenetv2_100", [320], [5], [[6, 4, 3]], **kwargs)
    image = torch.rand(1, 3, 240, 320)
    shapes = [[tuple(x.shape) for x in net(image)] for net in (both, alone)]
    assert shapes[0] == shapes[1] == [(1, 96, 30, 40), (1, 96, 15, 20), (1, 96, 7, 10)]
    assert both.strides == alone.strides == [8, 16, 32]
    counts = []
    for net in (both, alone):
        with FlopCounterMode(display=False) as counter:
            net(image)
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1]


def test_command_of_operations(capsys):
    assert run_flops(["experiment=piip_bccd", "model.net.backbone.weights=random"]) == 0
    assert "branch 1, 64 channels on 320 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stages": 8}, "stages: found 8, expected 1 to 7"),
        ({"stages": 0}, "stages: found 0, expected 1 to 7"),
        ({"frozen": 6}, "frozen: found 6, expected 0 to 5"),
        ({"groups": [6, 4]}, "expected all 13 of 5 stages of mobilenetv2_035"),
    ],
)
def test_mistakes(kwargs, message):
    with pytest.raises(UserError, match=message):
        branch(**kwargs)


def test_mistakes_of_models_and_lists():
    with pytest.raises(UserError, match="expected one of timm's EfficientNet"):
        EfficientNetBranch("resnet18", 64, 5, [6, 4, 3], "random")
    with pytest.raises(UserError, match="did you mean 'mobilenetv2_100'"):
        EfficientNetBranch("mobilenetv2_1000", 64, 5, [6, 4, 3], "random")
    with pytest.raises(UserError, match="sizes, stages, groups: found 2, 1 and 1"):
        efficientnet_backbone(NAME, [64, 128], [5], [[6, 4, 3]], "random")
