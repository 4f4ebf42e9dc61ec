"""What keeps frames apart: flips inside a frame, one look ahead, known frames from any inverse (arXiv 2511.20462)."""

import pytest
import torch

from penstock.lightning_modules.flow.inverse import Jacobi, Sequential
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.starflow import STARFlow

FRAMES, CHANNELS, ROWS, COLUMNS = 4, 2, 2, 2
CLIP, TALL = (FRAMES, CHANNELS, ROWS, COLUMNS), (CHANNELS, FRAMES * ROWS, COLUMNS)


def flow(shape, **options):
    torch.manual_seed(0)
    net = STARFlow(shape, 32, (1, 1, 2), head_dim=32, side=2, **options).double()
    for block in net.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    return net


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tall(clip):
    """Frames below one another in one picture."""
    return clip.movedim(1, 2).flatten(2, 3)


def frames_that_move(net, z, view):
    """Frames of a sample that change, and not by rounding, when frame 2 of the noise does."""
    other = z.clone()
    other[:, 2] += 0.5
    found, changed = (net.decode(view(x), Sequential())[0] for x in (z, other))
    change = (changed - found).abs()
    if change.ndim == 4:
        change = change.unflatten(2, (FRAMES, ROWS)).movedim(2, 1)
    return [bool(value > 1e-6) for value in change.amax((0, *range(2, change.ndim)))]


def test_flips_of_the_whole_clip_would_let_noise_reach_earlier_frames():
    z = normal(1, *CLIP)
    for frame_local in (True, False):
        assert frames_that_move(flow(CLIP, frame_local=frame_local), z, torch.clone) == [False] * 2 + [True] * 2
    assert frames_that_move(flow(TALL), z, tall) == [True] * 4


@pytest.mark.parametrize(("sight", "last"), [("first_layer", 1), ("every_layer", 8)])
def test_frames_that_the_first_frame_of_eight_layers_depends_on(sight, last):
    torch.manual_seed(0)
    net = FlowDenoiser(CHANNELS, 32, 8, 32, side=2, sight=sight).double()
    for weights in net.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    tokens = normal(1, 12, 2, CHANNELS).requires_grad_()
    (slope,) = torch.autograd.grad(net(tokens, (12, 1, 2))[:, 0].sum(), tokens)
    assert (slope.abs().sum((0, 2, 3)) > 0).tolist() == [True] * (last + 1) + [False] * (11 - last)


def test_known_frames_come_back_by_the_inverse_itself_and_to_the_bit_from_a_loose_one():
    net, x, z = flow(CLIP), normal(2, 2, *CLIP[1:]), normal(2, *CLIP, seed=2)
    with torch.no_grad():
        u, grid = net.tokens(x)
        for i in range(2):
            u, _ = net.through(u, i, grid, None)
        tokens, grid = net.tokens(z)
        tokens, _ = net.backward_through(tokens, 2, grid, Sequential(), known=u)
        for i in (1, 0):
            tokens, _ = net.backward_through(tokens, i, grid, Sequential())
    assert (net.untokens(tokens, grid, True)[:, :2] - x).abs().max() < 1e-10
    loose = net.decode(z, Jacobi(8, tolerance=0.3), known=x)[0]
    assert torch.equal(loose[:, :2], x)
    assert (loose - net.untokens(tokens, grid, True)).abs().max() > 1e-4
