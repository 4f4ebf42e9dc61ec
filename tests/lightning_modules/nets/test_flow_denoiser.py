"""The denoiser against numbers of the released network, and what frames it sees."""

import pytest
import torch

from penstock.kernels import dispatch
from penstock.lightning_modules.nets import flow_denoiser
from penstock.lightning_modules.nets.flow_denoiser import BLOCK, FlowDenoiser, frame_blocks, frame_mask


def released(case, ahead=1, window=10):
    return case.load(FlowDenoiser(3, 32, 2, 32, 5, 4, window, "every_layer", ahead), "learnable_self_denoiser.")


def denoised(net, x, text):
    """`d(x, text)` of a clip or an image, in their layout."""
    tokens = (x if x.ndim == 5 else x[:, None]).movedim(2, -1)
    d = net(tokens.flatten(2, 3), tokens.shape[1:4], text, x.ndim == 5).reshape(tokens.shape)
    return d.movedim(-1, 2).reshape(x.shape)


def dependence(net, x, text):
    """Entry (i, j): whether frame i of the result depends on frame j of the clip."""
    x = x.detach().requires_grad_()
    frames = denoised(net, x, text).sum((0, 2, 3, 4))
    return torch.stack(
        [torch.autograd.grad(frame, x, retain_graph=True)[0].abs().sum((0, 2, 3, 4)) > 0 for frame in frames]
    )


@pytest.mark.parametrize(("name", "window"), [("A1_G2", 2), ("A2_G10", 10), ("A2_G3", 3), ("A3_Gnone", None)])
def test_denoiser(record, name, window):
    case = record("starflow_v", "04", f"{name}/")
    net = released(case, int(name[1]) - 1, window)
    case.same(denoised(net, case["x"], case["text"]), f"{name}/denoiser_out")
    case.same(net.masks((6, 2, 3), 3)[1], f"{name}/mask")
    case.same(net.masks((6, 2, 3), 0)[1], f"{name}/mask_no_text")


def test_denoiser_of_an_image_and_what_frames_it_depends_on(record):
    case = record("starflow_v", "04", "image|frame")
    net = released(case)
    case.same(denoised(net, case["image"], case["text"]), "image_no_mask/denoiser_out")
    case.same(dependence(net, case["x"], case["text"]), "frame_dependency_A2_G10")


@torch.no_grad()
def test_denoiser_in_chunks_that_read_what_they_overwrite(record):
    case = record("starflow_v", "04", "chunked")
    net, x, overlap = released(case, window=2), case["x"], 2
    for start, kept in ((0, 0), (2, overlap)):
        chunk = x[:, start : start + 4]
        x[:, start + kept : start + 4] = (chunk - 0.3 * denoised(net, chunk, case["text"]))[:, kept:]
    case.same(x, "chunked/x_denoised")


def random_net(depth=3, **options):
    torch.manual_seed(0)
    net = FlowDenoiser(3, 32, depth, 32, 5, 4, **options).double()
    for weights in net.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    return net


def clip(frames=7):
    x = torch.randn(1, frames, 3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.ones(1, 3, 5, dtype=torch.float64)


def band(frames, past, ahead):
    """Frame i sees frames from i - past to i + ahead."""
    n = torch.arange(frames)
    return (n[None] >= n[:, None] - past) & (n[None] <= n[:, None] + ahead)


@pytest.mark.parametrize(
    ("options", "past", "ahead"),
    [
        ({"sight": "first_layer"}, 7, 1),
        ({"sight": "first_layer", "ahead": 0}, 7, 0),
        ({"sight": "first_layer", "ahead": 2, "window": None}, 7, 2),
        ({"sight": "first_layer", "window": 2, "depth": 1}, 1, 1),
        ({"sight": "first_layer", "window": 2, "depth": 2}, 3, 1),
        ({"sight": "every_layer"}, 7, 3),
    ],
)
def test_frames_that_a_frame_depends_on(options, past, ahead):
    x, text = clip()
    assert torch.equal(dependence(random_net(**options), x, text), band(7, past, ahead))


def test_mask_of_three_frames_of_two_tokens_and_one_text_token():
    seen = frame_mask(3, 2, 1, ahead=1, window=1, text_reads=False)
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        *[[1, 1, 1, 1, 1, 0, 0]] * 2,
        *[[1, 0, 0, 1, 1, 1, 1]] * 2,
        *[[1, 0, 0, 0, 0, 1, 1]] * 2,
    ]
    assert frame_mask(3, 2, 1, 1, 1, text_reads=True)[0].tolist() == [True] * 5 + [False] * 2


def test_a_new_net_gives_its_bias():
    x, text = clip()
    net = FlowDenoiser(3, 32, 1, 32, 5).double()
    assert torch.equal(denoised(net, x, text), net.proj_out.bias[:, None, None].expand(x.shape))


def test_text_is_optional_and_matters():
    x, text = clip()
    net = random_net()
    assert (denoised(net, x, text) - denoised(net, x, -text)).abs().amax((0, 2, 3, 4)).min() > 1e-3
    without = FlowDenoiser(3, 32, 1, 32).double()
    assert denoised(without, x, None).shape == x.shape


RULES = [(1, 10, True), (0, 10, True), (1, 2, False), (1, None, True), (3, 1, False)]


@pytest.mark.parametrize(("ahead", "window", "reads"), RULES)
@pytest.mark.parametrize(("frames", "size", "text"), [(13, 70, 40), (4, 128, 128), (1, 300, 0), (21, 11, 5)])
def test_blocks_are_those_of_the_dense_mask(frames, size, text, ahead, window, reads):
    given = (frames, size, text, ahead, window, reads)
    dense, blocks = frame_mask(*given), frame_blocks(*given)
    n = len(dense)
    index = torch.arange(n)
    assert torch.equal(blocks.mask_mod(0, 0, index[:, None], index[None]), dense)
    padded = torch.nn.functional.pad(dense, (0, -n % BLOCK, 0, -n % BLOCK))
    tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).sum((1, 3))
    for number, order, expected in (
        (blocks.kv_num_blocks, blocks.kv_indices, (tiles > 0) & (tiles < BLOCK**2)),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, tiles == BLOCK**2),
    ):
        found = [sorted(row[:k].tolist()) for row, k in zip(order[0, 0], number[0, 0].tolist())]
        assert found == [row.nonzero().flatten().tolist() for row in expected]


def test_blocks_of_the_released_clip_are_few_and_take_little_memory():
    blocks = frame_blocks(21, 30 * 53, 256, 1, 10, True)
    assert blocks.shape[-2:] == (33646, 33646)
    assert 50 < blocks.sparsity() < 60
    assert blocks.kv_num_blocks.sum() < 0.2 * blocks.full_kv_num_blocks.sum()
    tables = [blocks.kv_indices, blocks.full_kv_indices, blocks.q_indices, blocks.full_q_indices]
    assert sum(x.nbytes for x in tables) < 2e6


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("sight", ["first_layer", "every_layer"])
def test_blocks_and_the_dense_mask_make_the_same(monkeypatch, sight):
    monkeypatch.setattr(flow_denoiser, "SPARSE", 1)
    monkeypatch.setattr("penstock.kernels.rotary.use_triton", lambda x: False)
    masks, given = [], frame_blocks
    monkeypatch.setattr(flow_denoiser, "frame_blocks", lambda *a: masks.append(given(*a)) or masks[-1])
    x = torch.randn(1, 7, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    net, text = random_net(2, sight=sight, window=2).float(), torch.ones(1, 3, 5)
    dense = denoised(net, x, text)
    with dispatch.backend("triton"):
        sparse = denoised(net, x, text)
    assert len(masks) == 2
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    assert (dense - denoised(random_net(2, sight=sight, window=3).float(), x, text)).abs().max() > 1e-2


def test_masks_are_kept_and_may_be_made_during_validation():
    net, (x, text) = random_net(), clip(9)
    with torch.inference_mode():
        denoised(net, x, text)
    made = frame_mask.cache_info().misses
    denoised(net, x, text).sum().backward()
    assert frame_mask.cache_info().misses == made
    assert net.proj_in.weight.grad.abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_blocks_on_cuda():
    torch.manual_seed(0)
    net = FlowDenoiser(3, 128, 2, 64, 5, 4, window=2)
    torch.nn.init.normal_(net.proj_out.weight, std=0.2)
    x, text = torch.randn(1, 13, 3, 12, 15), torch.ones(1, 3, 5)
    grads = []
    for backend in ("reference", "triton"):
        net.zero_grad()
        with dispatch.backend(backend):
            found = denoised(net.cuda(), x.cuda(), text.cuda())
        found.square().sum().backward()
        grads.append((found.detach(), net.proj_in.weight.grad.clone()))
    for dense, sparse in zip(*grads):
        torch.testing.assert_close(sparse, dense, rtol=1e-2, atol=1e-2)
