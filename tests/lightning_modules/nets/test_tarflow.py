"""TARFlow against numbers of the released code, and what it does with labels and sizes."""

import pytest
import torch

from penstock.lightning_modules.flow.affine import LinearGuidance, nll
from penstock.lightning_modules.flow.inverse import Sequential
from penstock.lightning_modules.nets.tarflow import TARFlow


def tarflow(case, classes, volume_preserving=False):
    return case.load(TARFlow((3, 6, 6), 2, 32, 3, 2, classes, 16, volume_preserving), unused="attn_mask")


def same_tarflow_forward(case, net, cond=None):
    x = case["x"].requires_grad_()
    flow = net(x, cond)
    case.same(net.tokens(flow.z)[0], "z")
    case.same(flow.states[0], "patchified")
    for i, state in enumerate(flow.states[1:]):
        case.same(state, f"block_out/{i}")
    loss = nll(flow.z, flow.logdets).mean()
    loss.backward()
    case.same(loss, "loss")
    case.same(x.grad, "grad_x")
    return flow


def per_sample(flow):
    return sum(logdet.flatten(1).mean(1) for logdet in flow.logdets)


def noise(case, net):
    return net.prior(net.untokens(case["z"][:, None], (1, 3, 3), False))


@torch.no_grad()
def sample(net, z, cond=None, weak=None, guidance=None, temperature=1.0):
    tokens, grid = net.tokens(z)
    for i in reversed(range(len(net.blocks))):
        tokens, _ = net.backward_through(tokens, i, grid, Sequential(), cond, weak, guidance, temperature)
    return net.untokens(tokens, grid, False)


def test_tarflow_with_classes(record):
    case = record("starflow", "09")
    net, label = tarflow(case, 5), case["class_index"]
    case.same(per_sample(same_tarflow_forward(case, net, label)), "logdet_sum_of_blocks")
    for name, cond in (("dropped", case["class_index_dropped"]), ("uncond", None)):
        flow = net(case["x"], cond)
        case.same(net.tokens(flow.z)[0], f"{name}/z")
        case.same(per_sample(flow), f"{name}/logdet")
    options = {
        "sample/x": (None, 1.0),
        "sample_guided/a": (LinearGuidance(0.8, mean=False), 1.0),
        "sample_guided/b": (LinearGuidance(0.8, scale=False), 1.0),
        "sample_guided/ab": (LinearGuidance(0.8), 1.0),
        "sample_guided/ab_annealed": (LinearGuidance(0.8, annealed=True), 1.0),
        "sample_guided/ab_temp": (LinearGuidance(0.8), 1.5),
    }
    for key, (guidance, temperature) in options.items():
        case.same(sample(net, noise(case, net), label, torch.full_like(label, -1), guidance, temperature), key)


def test_volume_preserving_tarflow(record):
    case = record("starflow", "10")
    net = tarflow(case, 0, volume_preserving=True)
    options = {
        "sample/x": (None, 1.0),
        "sample_guided/b_temp": (LinearGuidance(0.5, scale=False), 0.5),
        "sample_guided/b_temp_annealed": (LinearGuidance(0.5, annealed=True, scale=False), 1.5),
    }
    for key, (guidance, temperature) in options.items():
        case.same(sample(net, noise(case, net), None, None, guidance, temperature), key)
    flow = same_tarflow_forward(case, net)
    case.same(per_sample(flow), "logdet_sum_of_blocks")
    net.update_prior(flow.z)
    case.same(net.var, "var_after_update")


def random_tarflow(shape=(3, 4, 6), classes=3):
    torch.manual_seed(0)
    net = TARFlow(shape, 2, 32, 3, 1, classes, 16)
    for block in net.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.05)
    return net


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_samples_undo_the_flow():
    net, x, label = random_tarflow(), normal(2, 3, 4, 6), torch.tensor([0, -1])
    torch.testing.assert_close(sample(net, net(x, label).z.detach(), label), x, rtol=0, atol=1e-5)


def test_a_patch_has_its_channel_slowest():
    net, x = random_tarflow(), normal(2, 3, 4, 6)
    tokens, grid = net.tokens(x)
    assert grid == (1, 2, 3)
    assert torch.equal(tokens[:, 0, 1 * 3 + 2], x[:, :, 2:4, 4:6].flatten(1))
    assert torch.equal(net.untokens(tokens, grid, False), x)


def test_the_first_token_read_stays_as_it_is():
    net, x = random_tarflow(), normal(2, 3, 4, 6)
    states = net(x).states
    assert torch.equal(states[1][:, 0, 0], states[0][:, 0, 0])
    assert torch.equal(states[2][:, 0, -1], states[1][:, 0, -1])
    assert not torch.equal(states[2][:, 0, 0], states[1][:, 0, 0])


def test_the_prior_follows_the_noise():
    net, z = random_tarflow(), normal(500, 3, 4, 6) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    assert torch.equal(net.prior(z), z)
    for _ in range(60):
        net.update_prior(z)
    spread = net.prior(normal(500, 3, 4, 6, seed=2)).std((0, 2, 3))
    assert spread.tolist() == pytest.approx([1, 2, 3], rel=0.03)


def test_a_dropped_label_is_the_mean_of_all():
    net, x = random_tarflow(), normal(3, 3, 4, 6)
    label, mask = torch.tensor([0, 1, 2]), torch.tensor([True, False, True])
    dropped = net.drop_condition(label, mask)
    assert dropped.tolist() == [-1, 1, -1]
    z, without = net(x, dropped).z, net(x).z
    torch.testing.assert_close(z[mask], without[mask])
    assert (z - without)[1].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"shape": (3, 5, 6)}, r"multiples of 2 \(the patch\), got 5x6"),
        ({"shape": (6, 6)}, r"shape \(6, 6\): expected \(channels, height, width\)"),
        ({"shape": (3, 4, 4), "dim": 40}, "width 40, expected a multiple of 64"),
    ],
)
def test_options_out_of_range(options, line):
    with pytest.raises(ValueError, match=line):
        TARFlow(**options)
