"""STARFlow and STARFlow-V against numbers of the released code: blocks, networks, gradients, samplers.

Rotary tables, TARFlow and the denoiser are compared in test_rotary.py, test_tarflow.py and test_flow_denoiser.py.
"""

import pytest
import torch
from golden_files import TOLERANCE

from penstock.kernels import rotary
from penstock.lightning_modules.flow.affine import ScoreGuidance, nll
from penstock.lightning_modules.flow.inverse import Jacobi, Sequential, Trace, prepared
from penstock.lightning_modules.flow.sliding import Sliding
from penstock.lightning_modules.nets.autoregressive import AutoregressiveBlock, Decoder
from penstock.lightning_modules.nets.causal_transformer import gemma_layer
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.rotary import Rotary
from penstock.lightning_modules.nets.starflow import STARFlow, plain

SEQUENTIAL, UNUSED = Sequential(), "attn_mask|feat_rope|var|denoiser"
DENOISER = "learnable_self_denoiser."


def released(chunk, tolerance, sweeps=32):
    """The Jacobi iteration of the release.

    A chunk that begins after the first token of frame 2 starts one frame earlier, the token before it included, which
    was exact; it may take a sweep more than it has tokens. The cache keeps what went into the last sweep.
    """

    def inverse(laws, first, z, frame, known=None, told=None, agreed=None):
        (x, place), trace = prepared(laws, first, z, known), Trace()
        while place < z.shape[1]:
            end = min(place + (chunk if place <= frame else 4 * chunk), z.shape[1])
            back = frame if place > frame else 0
            before = x[:, place - back : end - back]
            trace.sweeps.append(0)
            for _ in range(sweeps):
                trace.sweeps[-1] += 1
                mu, sigma = laws(before, place)
                new = mu + sigma * z[:, place:end]
                change = (new - x[:, place + 1 : end + 1]).square().mean()
                x[:, place + 1 : end + 1] = new
                if change < tolerance * new.square().mean():
                    break
                before = x[:, place:end]
            place = end
        return x[:, 1:], trace

    return inverse


@torch.no_grad()
def decoded(net, z, inverse, cond, weak, guidance, known=None):
    """Data that noise becomes: after the deep block, and after each of the others."""
    tokens, grid = net.tokens(z)
    states, deep = [], len(net.blocks) - 1
    for i in reversed(range(deep + 1)):
        own = known if i == deep else None
        tokens, _ = net.backward_through(tokens, i, grid, inverse, cond, weak, guidance, known=own)
        states.append(net.untokens(tokens, grid, z.ndim == 5))
    return states


def same_forward(case, net, cond, weight=1.0, penalty=0.0):
    """Compares noise, log-determinants, losses and gradients; returns the input, with its gradient."""
    raw = []
    for block in net.blocks:
        block.proj_out.register_forward_hook(lambda *call: raw.append(call[-1]))
    x = case["x"].requires_grad_()
    flow = net(x, cond)
    case.same(flow.z, "z")
    for name, values in (("block_out", flow.states), ("logdet", flow.logdets), ("proj_out_raw", raw)):
        for i, value in enumerate(values):
            case.same(value, f"{name}/{i}")
    latent = sum(state.square().mean() for state in flow.states[:-1])
    loss = weight * nll(flow.z, flow.logdets).mean()
    total = loss + penalty * latent
    total.backward()
    case.same(0.5 * flow.z.square().mean(), "loss_z")
    case.same(-sum(logdet.mean() for logdet in flow.logdets), "loss_logdet")
    case.same(loss, "loss_nll_weighted")
    case.same(latent, "latent_penalty_sum")
    case.same(total, "loss_total")
    same_gradients(case, net, x)
    return x


def same_gradients(case, net, x, prefix=""):
    case.same(x.grad, f"{prefix}grad_x")
    start = f"{prefix}grad_param/"
    for key in [key for key in case.left if key.startswith(start) and DENOISER not in key]:
        case.same(net.get_parameter(key.removeprefix(start)).grad, key)


def same_samples(case, net, weight, cond, weak, inverses):
    """Compares samples under guidance by the inverses of the names, and the states on the way."""
    guidance = ScoreGuidance(weight) if weight else None
    for name, inverse in inverses:
        states = decoded(net, case["z"], inverse, cond, weak, guidance)
        case.same(states[-1], f"sample_w{weight}/{name}")
        if inverse is SEQUENTIAL:
            for i, state in enumerate(states[:-1]):
                case.same(state, f"sample_w{weight}/after_reversed_block/{i}")


def unit_gradient(net, x, cond):
    """`numel dL/dx` with the mean loss L: minus the score."""
    x = x.detach().requires_grad_()
    flow = net(x, cond)
    return torch.autograd.grad(nll(flow.z, flow.logdets).mean(), x)[0] * x.numel()


def same_block(case, block, order, grid, text=None, prefix=""):
    """Compares a block's forward pass, gradients and inverse, with tokens that are read by `order`."""
    x = case["x"].requires_grad_()
    found = block(order(x.flatten(1, 2)), grid, text)
    case.same(order(found.z), f"{prefix}z")
    case.same(found.logdet, f"{prefix}logdet")
    loss = nll(found.z, [found.logdet]).mean()
    loss.backward()
    case.same(loss, f"{prefix}loss")
    same_gradients(case, block, x, prefix)
    case.same(order(inverted(block, order(case["z"].flatten(1, 2)), grid, text)), f"{prefix}x_from_z")
    return found


@torch.no_grad()
def inverted(block, z, grid, text=None, weak=None, guidance=None, inverse=SEQUENTIAL):
    first, rest = block.split(z)
    u, _ = inverse(Decoder(block, grid, len(z), text, weak, guidance), first, rest, z.shape[1])
    return u if block.sos_embed is not None else torch.cat([first, u], 1)


ORDERS = pytest.mark.parametrize(
    ("name", "order"), [("identity", torch.clone), ("flip", lambda x: x.flip(1))], ids=["forwards", "backwards"]
)


@ORDERS
def test_block_with_text(record, name, order):
    case, grid = record("starflow", "01", f"{name}/"), (1, 3, 4)
    block = case.load(AutoregressiveBlock(3, 64, 2, Rotary(32, 3, 4), 5, layer=plain(32)), unused=UNUSED)
    found = same_block(case, block, order, grid, case["text"], f"{name}/")
    case.same(found.raw, f"{name}/proj_out_raw")
    case.same(found.text, f"{name}/text_out")
    z = order(case["z"].flatten(1, 2))
    guided = inverted(block, z, grid, case["text"], case["text_uncond"], ScoreGuidance(2.0))
    case.same(order(guided), f"{name}/x_guided")
    for sweeps in (1, 2, 3, 5, 8, 12):
        jacobi = Jacobi(12, tolerance=0, max_sweeps=sweeps, start="noise")
        case.same(order(inverted(block, z, grid, case["text"], inverse=jacobi)), f"{name}/jacobi_sweeps_{sweeps}")


@ORDERS
@pytest.mark.parametrize(("number", "options"), [("02", {"final_norm": False}), ("03", {"start_token": False})])
def test_block_of_exponential_scale(record, number, options, name, order):
    case = record("starflow", number, f"{name}/")
    block = AutoregressiveBlock(4, 48, 2, Rotary(24, 2, 4), 0, "exp", 0.0, layer=plain(24), **options)
    same_block(case, case.load(block, unused=UNUSED), order, (1, 3, 3), prefix=f"{name}/")


def test_block_like_a_language_model(record):
    case = record("starflow", "08")
    block = AutoregressiveBlock(
        3, 48, 2, Rotary(12, 1, 4), 48, project_text=False, layer=lambda dim: gemma_layer(dim, 12, 4, 2)
    )
    found = same_block(case, case.load(block, unused=UNUSED), torch.clone, (1, 2, 4), case["text"])
    case.same(found.text, "text_out")


@pytest.mark.parametrize("weight", [0.25, 1, 3.6, 7.5])
def test_guidance(record, weight):
    case = record("starflow", "07", f"[a-z]+_w{weight}$")
    laws = (case[name] for name in ("mu_c", "sigma_c", "mu_u", "sigma_u"))
    mu, sigma = ScoreGuidance(weight)(*laws, torch.ones(60))
    case.same(mu, f"mu_w{weight}")
    case.same(sigma, f"sigma_w{weight}")


def text_to_image(case):
    return case.load(STARFlow((4, 3, 4), 64, (1, 1, 1, 2), head_dim=32, text_dim=6, side=4), unused=UNUSED)


def test_text_to_image(record):
    case = record("starflow", "04", "(?!sample)")
    net = text_to_image(case)
    x = same_forward(case, net, case["text"], penalty=1e-4)
    case.same(x - 0.3**2 * unit_gradient(net, x, case["text"]), "tweedie_x_sigma")


@pytest.mark.parametrize("weight", [0, 2.5])
def test_samples_of_text_to_image(record, weight):
    case = record("starflow", "04", f"sample_w{weight}/")
    net = text_to_image(case)
    inverses = [
        ("x", SEQUENTIAL),
        ("x_jacobi_tau0", Jacobi(4, tolerance=0)),
        ("x_jacobi_tau", released(4, 1e-3)),
        ("x_jacobi_tau", Jacobi(4, start="noise", refresh=False)),
    ]
    same_samples(case, net, weight, case["text"], case["text_uncond"], inverses)


def class_to_image(case):
    options = {"head_dim": 24, "text_dim": 11, "text_everywhere": True, "patch": 2, "order": "R2L", "side": 4}
    return case.load(STARFlow((3, 6, 4), 48, (1, 1, 1), **options), unused=UNUSED)


def test_class_to_image(record):
    case = record("starflow", "05", "(?!sample)")
    net, onehot = class_to_image(case), case["text_onehot"]
    assert torch.equal(onehot[:, 0].argmax(1), case["class_index"])
    same_forward(case, net, onehot, weight=1.5)
    case.same(net.tokens(case["x"])[0], "patchified")


@pytest.mark.parametrize("weight", [0, 1.5])
def test_samples_of_class_to_image(record, weight):
    case = record("starflow", "05", f"sample_w{weight}/")
    net = class_to_image(case)
    same_samples(case, net, weight, case["text_onehot"], case["text_onehot_uncond"], [("x", SEQUENTIAL)])


def text_to_video(case, depths=(1, 1, 1, 2)):
    return case.load(STARFlow((4, 3, 2, 3), 32, depths, 64, 32, text_dim=5, side=4), unused=UNUSED)


DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@DTYPES
def test_text_to_video(record, dtype):
    case = record("starflow_v", "01", "(?!sample)", dtype)
    net, sigma, text = text_to_video(case), 0.5, case["text"]
    denoiser = case.load(FlowDenoiser(3, 32, 2, 32, 5, 4, 10, "every_layer", 1), DENOISER)
    x = same_forward(case, net, text, weight=sigma / 0.3)
    score = -unit_gradient(net, x, text)
    case.same(x + sigma**2 * score, "denoised_tweedie")
    target = x.grad * x.numel() * sigma
    case.same(target, "fsm_target")
    case.same(denoiser.masks((4, 2, 3), 3)[0], "denoiser_mask")
    tokens, grid = net.tokens(case["x"])
    d = net.untokens(denoiser(tokens, grid, text), grid, True)
    case.same(d, "denoiser_out")
    case.same(case["x"] - 0.3 * d, "denoised_learned_full")
    case.same(case["x"] - 0.15 * d, "denoised_learned_to_half_sigma")
    loss = (d - target).square().mean()
    loss.backward()
    case.same(loss, "denoiser_loss")
    for name in ("proj_out.weight", "proj_txt.weight"):
        case.same(denoiser.get_parameter(name).grad, f"grad_param/{DENOISER}{name}")


@pytest.mark.parametrize(("weight", "dtype"), [(0, torch.float64), (2.5, torch.float64), (2.5, torch.float32)])
def test_samples_of_text_to_video(record, weight, dtype):
    case = record("starflow_v", "01", f"sample_w{weight}/", dtype)
    inverses = [
        ("x", SEQUENTIAL),
        ("x_jacobi_tau0", released(4, 0)),
        ("x_jacobi_tau0", Jacobi(4, 16, tolerance=0)),
        ("x_jacobi_tau0", Sliding(7, 0.0)),
        ("x_jacobi_tau", released(4, 1e-3)),
    ]
    same_samples(case, text_to_video(case), weight, case["text"], case["text_uncond"], inverses)


@torch.no_grad()
@pytest.mark.parametrize("weight", [0, 2.5])
def test_jacobi_takes_fewer_sweeps_than_the_released_one(record, weight):
    case = record("starflow_v", "01", f"sample_w{weight}/after_reversed_block/0")
    net, cond = text_to_video(case), (case["text"], case["text_uncond"], ScoreGuidance(weight))
    z, grid = net.tokens(case["z"])

    def deep(inverse):
        u, trace = net.backward_through(z, 3, grid, inverse, *cond)
        return net.untokens(u, grid, True), trace.calls

    for tolerance in (1e-3, 1e-6):
        assert deep(Jacobi(4, 16, tolerance))[1] < deep(released(4, tolerance))[1]
    key = f"sample_w{weight}/after_reversed_block/0"
    assert case.error(deep(released(4, 0, sweeps=16))[0], key) > 1e-6
    case.same(deep(Jacobi(4, 16, 0, max_sweeps=16))[0], key)


def test_image_to_video(record):
    case = record("starflow_v", "02")
    net, text, weak, guidance = text_to_video(case), case["text"], case["text_uncond"], ScoreGuidance(2.5)

    @torch.no_grad()
    def known(x):
        tokens, grid = net.tokens(x)
        for i in range(3):
            tokens, _ = net.through(tokens, i, grid, None)
        return tokens

    def sample(inverse, frames):
        return decoded(net, case["z"], inverse, text, weak, guidance, known=known(frames))

    u, first = known(case["first_frame"]), case["first_frame"]
    case.same(u, "u_first_frame")
    case.same(u, "u_first_frame_second_half")
    states = sample(SEQUENTIAL, first)
    case.same(states[0], "sequential/u")
    case.same(states[-1], "sequential/x")
    case.same(sample(SEQUENTIAL, case["prefix2"])[-1], "prefix2/sequential/x")
    for inverse in (Jacobi(4, 16, tolerance=0), Sliding(7, 0.0)):
        case.same(sample(inverse, first)[-1], "jacobi_tau0/x")
    case.same(sample(released(4, 1e-3), first)[-1], "jacobi_tau/x")

    deep, z = net.blocks[-1], net.tokens(case["z"])[0].flatten(1, 2)
    with torch.no_grad():
        laws = Decoder(deep, (3, 2, 3), 2, text, weak, guidance)
        prepared(laws, deep.split(z)[0], z, u.flatten(1, 2))
    filled = laws.cache.start + 6
    case.same(torch.full((2,), filled), "cache_len")
    keys, places = laws.cache.keys[0, :, :, :filled], [table[:filled] for table in laws.turn]
    case.same(rotary.reference(keys, *places, back=True), "deep_cache_k_layer0_unrotated")


def test_long_rollout(record):
    case = record("starflow_v", "03")
    net, text, weak, jacobi = text_to_video(case, (1, 2)), case["text"], case["text_uncond"], Jacobi(4, tolerance=0)
    z, grid = net.tokens(case["z"])

    @torch.no_grad()
    def deep(z, known=None):
        own = (z.shape[1], *grid[1:])
        return net.backward_through(z, 1, own, jacobi, text, weak, ScoreGuidance(1.5), known=known)[0]

    @torch.no_grad()
    def data(u):
        own = (u.shape[1], *grid[1:])
        return net.untokens(net.backward_through(u, 0, own, jacobi)[0], own, True)

    first = deep(z[:, :3])
    rollout = torch.cat([first, deep(z[:, 2:], first[:, 2:])[:, 1:]], 1)
    full = deep(z)
    case.same(data(first), "first_window/x")
    case.same(data(rollout), "rollout/x")
    for name, u in (("rollout", rollout), ("full_context", full)):
        case.same(net.untokens(u, grid, True), f"{name}/u")
    assert (full - rollout)[:, :3].abs().max() < 1e-12
    assert (full - rollout)[:, 3:].abs().amax((0, 2, 3)).min() > 1e-3


def image_through_video(case):
    return case.load(STARFlow((4, 3, 3, 3), 32, (1, 1, 1), 64, 32, text_dim=5, side=4), unused=UNUSED)


def test_image_through_the_video_model(record):
    case = record("starflow_v", "05", "(?!sample)")
    net = image_through_video(case)
    same_forward(case, net, case["text"])
    case.same(net(case["x"][:, None], case["text"]).z, "as_one_frame_video/z")


@pytest.mark.parametrize("weight", [0, 2])
def test_samples_of_an_image_through_the_video_model(record, weight):
    case = record("starflow_v", "05", f"sample_w{weight}/")
    net = image_through_video(case)
    inverses = [
        ("x", SEQUENTIAL),
        ("x_jacobi_tau0", Jacobi(4, 16, tolerance=0)),
        ("x_jacobi_tau0", Sliding(7, 0.0)),
        ("x_jacobi_tau", released(4, 1e-3)),
    ]
    same_samples(case, net, weight, case["text"], case["text_uncond"], inverses)
