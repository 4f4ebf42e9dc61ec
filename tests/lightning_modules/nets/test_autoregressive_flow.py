"""The stack of blocks on clips and images: which frames depend on which, patches, known frames, sizes of the papers."""

import pytest
import torch

from penstock.lightning_modules.flow.affine import ScoreGuidance
from penstock.lightning_modules.flow.inverse import Jacobi, Sequential
from penstock.lightning_modules.nets.autoregressive import AutoregressiveBlock
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.rotary import Rotary
from penstock.lightning_modules.nets.starflow import STARFlow, plain

CLIP = (6, 3, 3, 4)


def random_weights(net):
    for block in net.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.05)
    return net


def flow(shape=CLIP, depths=(2, 2, 2, 3), **options):
    torch.manual_seed(0)
    return random_weights(STARFlow(shape, 64, depths, head_dim=32, side=4, **options))


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def encoded(net, x, cond=None):
    return net(x, cond).z


@torch.no_grad()
def decoded(net, z, inverse, cond=None, weak=None, guidance=None, known=None):
    tokens, grid = net.tokens(z)
    deep = len(net.blocks) - 1
    for i in reversed(range(deep + 1)):
        own = known if i == deep else None
        tokens, _ = net.backward_through(tokens, i, grid, inverse, cond, weak, guidance, known=own)
    return net.untokens(tokens, grid, z.ndim == 5)


@torch.no_grad()
def shallow(net, x, cond=None):
    """Tokens before the deep block."""
    tokens, grid = net.tokens(x)
    for i in range(len(net.blocks) - 1):
        tokens, _ = net.through(tokens, i, grid, cond)
    return tokens


def largest(x):
    return float(x.detach().abs().max())


def moved(x, frame=3):
    """The clip with one frame changed."""
    other = x.clone()
    other[:, frame] += 0.5
    return other


def changed(x, other):
    """Largest change of each frame."""
    return (x - other).abs().amax((0, *range(2, x.ndim))).tolist()


# ---------------------------------------------------------------------- there and back


@pytest.mark.parametrize("order", ["L2R", "R2L"])
@pytest.mark.parametrize("shape", [CLIP, (3, 4, 4)])
def test_samples_undo_the_flow_token_by_token(shape, order):
    net, x = flow(shape, order=order), normal(2, *shape)
    z = encoded(net, x)
    assert largest(z - x) > 0.3
    assert largest(decoded(net, z, Sequential()) - x) < 1e-5


def test_samples_undo_the_flow_as_far_as_the_tolerance_goes():
    net, x = flow(), normal(2, *CLIP)
    z = encoded(net, x)
    errors = [decoded(net, z, Jacobi(8, 16, tolerance)) - x for tolerance in (0, 1e-8, 1e-3)]
    assert largest(errors[0]) < 1e-5
    assert largest(errors[1]) < 1e-3
    assert 1e-3 < errors[2].square().mean().sqrt() < 0.1


def test_log_determinants():
    net, x = flow((3, 4, 4), depths=(1, 1, 2)).double(), normal(1, 3, 4, 4).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: net(x).z, x).reshape(48, 48)
    found = sum(logdet.sum() for logdet in net(x).logdets)
    torch.testing.assert_close(found, torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=0)


# ---------------------------------------------------------------------- frames


def test_a_frame_of_a_sample_depends_on_the_noise_up_to_it():
    net, z = flow(), normal(2, *CLIP)
    found = changed(*(decoded(net, noise, Sequential()) for noise in (z, moved(z))))
    assert found[:3] == [0, 0, 0]
    assert min(found[3:]) > 1e-4


def test_a_frame_of_the_noise_depends_on_the_data_up_to_it():
    net, x = flow(), normal(2, *CLIP)
    found = changed(encoded(net, x), encoded(net, moved(x)))
    assert found[:3] == [0, 0, 0]
    assert min(found[3:]) > 1e-4


def test_shallow_blocks_see_one_frame():
    net, x = flow(), normal(2, *CLIP)
    found = changed(shallow(net, x), shallow(net, moved(x)))
    assert [change > 0 for change in found] == [frame == 3 for frame in range(6)]
    wide = flow(frame_local=False)
    assert changed(shallow(wide, x), shallow(wide, moved(x)))[5] > 1e-4


@torch.no_grad()
def test_a_frame_is_read_backwards_by_itself():
    net = flow(depths=(1, 1))
    tokens, grid = net.tokens(normal(2, *CLIP))
    found, _ = net.through(tokens, 0, grid, None)
    one_by_one = [net.through(tokens[:, [n]], 0, (1, *grid[1:]), None)[0] for n in range(6)]
    torch.testing.assert_close(found, torch.cat(one_by_one, 1), rtol=0, atol=1e-5)
    tokens[:, 2, 4] += 1.0
    reached = (net.through(tokens, 0, grid, None)[0] - found).abs().amax((0, 3)) > 1e-6
    assert reached[2].tolist() == [True] * 5 + [False] * 7
    assert reached.any(1).tolist() == [False, False, True, False, False, False]


def test_an_image_is_a_clip_of_one_frame():
    net, x = flow(), normal(2, *CLIP[1:])
    torch.testing.assert_close(encoded(net, x), encoded(net, x[:, None])[:, 0])


def test_shallow_blocks_read_the_text_of_their_sample():
    net = flow(depths=(1, 1, 1), text_dim=5, text_everywhere=True)
    x, text = normal(2, *CLIP), normal(2, 3, 5)
    u = shallow(net, x, text)
    for sample in range(2):
        frames = shallow(net, x[sample], text[[sample]].expand(6, -1, -1))
        torch.testing.assert_close(u[sample], frames[:, 0], rtol=0, atol=1e-5)
    z = encoded(net, x, text)
    assert largest(decoded(net, z, Sequential(), text) - x) < 1e-5
    weak = normal(2, 3, 5, seed=2)
    sequential = decoded(net, z, Sequential(), text, weak, ScoreGuidance(1.0))
    assert largest(sequential - x) > 1e-2
    assert largest(decoded(net, z, Jacobi(8, tolerance=0), text, weak, ScoreGuidance(1.0)) - sequential) < 1e-5


# ---------------------------------------------------------------------- known frames


@pytest.mark.parametrize("number", [1, 2, 6])
def test_known_frames_come_back(number):
    net, x, z = flow(text_dim=5), normal(2, number, *CLIP[1:]), normal(2, *CLIP, seed=2)
    text = normal(2, 3, 5), normal(2, 3, 5, seed=2), ScoreGuidance(1.0)
    found = decoded(net, z, Sequential(), *text, known=shallow(net, x))
    assert largest(found[:, :number] - x) < 1e-5
    if number < 6:
        other = decoded(net, z, Sequential(), *text, known=shallow(net, -x))
        assert min(changed(found, other)[number:]) > 1e-3


@pytest.mark.parametrize("order", ["L2R", "R2L"])
def test_known_frames_of_a_deep_block_that_reads_backwards(order):
    net, x = flow(depths=(1, 1), order=order), normal(2, *CLIP)
    u, z = shallow(net, x), encoded(net, x)
    assert largest(decoded(net, z, Sequential(), known=u[:, :2]) - x) < 1e-5


def test_known_frames_without_a_start_token():
    torch.manual_seed(0)
    rotary = Rotary(32, 3, 4)
    blocks = [AutoregressiveBlock(3, 64, 1, rotary, start_token=False, layer=plain(32)) for _ in range(2)]
    net, x = random_weights(AutoregressiveFlow(blocks, CLIP)), normal(2, *CLIP)
    z = encoded(net, x)
    assert largest(decoded(net, z, Sequential(), known=shallow(net, x)[:, :0]) - x) < 1e-5
    z[:, 0] = 7.0
    assert largest(decoded(net, z, Sequential(), known=shallow(net, x)[:, :1]) - x) < 1e-5


def test_more_known_frames_than_there_are():
    net = flow(depths=(1, 1))
    with pytest.raises(ValueError, match=r"known tokens \(2, 84, 3\), expected at most those of \(2, 72, 3\)"):
        decoded(net, normal(2, *CLIP), Sequential(), known=torch.zeros(2, 7, 12, 3))


def test_windows_go_on_from_their_last_frames():
    net, (z, grid) = flow(depths=(1, 2)), flow().tokens(normal(2, *CLIP))

    @torch.no_grad()
    def deep(z, known=None):
        return net.backward_through(z, 1, (z.shape[1], *grid[1:]), Sequential(), known=known)[0]

    window, full = deep(z[:, :4]), deep(z)
    assert largest(window - full[:, :4]) < 1e-6
    rest = deep(z[:, 2:], window[:, 2:])[:, 2:]
    assert min(changed(rest, full[:, 4:])) > 1e-4


# ---------------------------------------------------------------------- patches


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 3, 4, 10)])
def test_patches(shape):
    net, x = flow(shape, depths=(1, 1), patch=2), normal(2, *shape)
    tokens, grid = net.tokens(x)
    frames, (rows, columns) = (1 if len(shape) == 3 else shape[0]), (shape[-2] // 2, shape[-1] // 2)
    assert grid == (frames, rows, columns)
    assert tokens.shape == (2, frames, rows * columns, 12)
    clip = x.reshape(2, frames, *shape[-3:])
    for row, column in ((0, 1), (rows - 1, columns - 1)):
        patch = clip[:, :, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[:, :, row * columns + column], patch.permute(0, 1, 3, 4, 2).flatten(2))
    assert torch.equal(net.untokens(tokens, grid, len(shape) == 4), x)
    assert largest(decoded(net, encoded(net, x), Sequential()) - x) < 1e-5


def test_another_number_of_frames_and_another_size():
    net, x = flow(depths=(1, 1)), normal(2, 2, 3, 2, 6)
    assert largest(decoded(net, encoded(net, x), Sequential()) - x) < 1e-5


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"shape": (3, 4)}, r"shape \(3, 4\): expected \(channels, height, width\)"),
        ({"shape": (3, 0, 4)}, r"shape \(3, 0, 4\)"),
        ({"shape": (3, 5, 4), "patch": 2}, r"multiples of 2 \(the patch\), got 5x4"),
        ({"depths": ()}, r"depths \(\): expected a number of layers, at least 1, for every block"),
        ({"depths": (2, 0)}, r"depths \(2, 0\)"),
        ({"head_dim": 16, "text_dim": 5}, "heads of 16, expected a multiple of 4, at least 20"),
        ({"dim": 80}, "width 80, expected a multiple of 64"),
        ({"text_dim": 5, "deep": "gemma3_1b"}, "text of 5 numbers without a projection, expected 64"),
    ],
)
def test_options_out_of_range(options, line):
    with pytest.raises(ValueError, match=line):
        STARFlow(**{"shape": (3, 4, 4), "dim": 64, "depths": (1, 1), **options})


@pytest.mark.parametrize("shape", [(2, 6, 4, 3, 4), (2, 3, 4), (2, 6, 3, 3, 5)])
def test_data_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"expected samples like \(B, 6, 3, 4, 4\), got"):
        flow((6, 3, 4, 4), depths=(1,), patch=2)(torch.zeros(shape))


# ---------------------------------------------------------------------- sizes


def parameters(net):
    return sum(weights.numel() for weights in net.parameters())


def test_parameters_of_text_to_video():
    with torch.device("meta"):
        net = STARFlow((21, 48, 30, 53), 3072, (2, 2, 2, 2, 2, 24), deep_dim=4096, text_dim=2048)
        denoiser = FlowDenoiser(48, text_dim=2048)
    assert [parameters(block) for block in net.blocks] == [227_020_944] * 5 + [4_842_107_024]
    assert parameters(denoiser) == 912_884_784
    assert parameters(net) + parameters(denoiser) == 6_890_096_528


def test_parameters_of_text_to_image():
    with torch.device("meta"):
        net = STARFlow((4, 32, 32), 3072, (2, 2, 2, 2, 2, 24), text_dim=2048)
    assert [parameters(block) for block in net.blocks] == [226_615_308] * 5 + [2_725_205_004]
    assert parameters(net) == 3_858_281_544


def test_parameters_of_class_to_image():
    with torch.device("meta"):
        assert parameters(STARFlow((4, 32, 32), text_dim=1001)) == 1_412_255_816
