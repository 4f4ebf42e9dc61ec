"""TwinFlow against numbers of the released code (tests/golden/twinflow): networks, targets, whole steps, samplers.

Their time is 1 - t, their F is -u; samples are flat there. Tolerances are those that the recorded numbers are good to.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.flow.any_step import displacement, ends, mix, rcgm_target, time_weight
from penstock.lightning_modules.flow.any_step_sampler import AnyStepSampler
from penstock.lightning_modules.flow.barron import Barron
from penstock.lightning_modules.flow.blocks import block_sizes
from penstock.lightning_modules.flow.losses import Regression, SquaredError
from penstock.lightning_modules.nets.any_step import HalfTime
from penstock.lightning_modules.nets.twinflow_tutorial import TwinFlowMLP, TwinFlowUNet
from penstock.lightning_modules.twinflow import StepDraws, TwinFlow

FOLDER = Path(__file__).parents[1] / "golden" / "twinflow"


def case(name):
    """Entries of one file: (weights, in, out), each by the rest of its key."""
    (path,) = FOLDER.glob(f"{name}_*.safetensors")
    parts = {"weights": {}, "in": {}, "out": {}}
    for key, value in load_file(path).items():
        part, _, rest = key.partition("/")
        parts[part][rest] = value
    return parts["weights"], parts["in"], parts["out"]


def unet(weights, prefix=""):
    net = TwinFlowUNet((1, 8, 8), 4, 8, 6, 5).double()
    net.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return net


def image(x):
    return x.reshape(-1, 1, 8, 8)


def times(t):
    """Theirs `(B, 1)` or `(B,)` as ours `(B,)`."""
    return 1 - t.flatten()


def same(found, expected, rtol):
    """Equal relative to the largest entry, so that entries near 0 do not decide."""
    found = found.reshape(expected.shape).to(expected.dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_network_of_the_image_tutorial():
    weights, given, out = case("01")
    net = unet(weights)
    x, t, r = (
        image(given["x"]).requires_grad_(),
        times(given["t"]).requires_grad_(),
        times(given["tt"]).requires_grad_(),
    )
    y = -net(x, t, given["label"], r)
    same(y, out["y"], 1e-10)
    same(-net(x, t, None, r), out["y_no_label"], 1e-10)
    same(-net(x, t, torch.full_like(given["label"], -1), r), out["y_no_label"], 1e-10)
    (y * image(given["cotangent"])).sum().backward()
    same(x.grad, out["grad_x"], 1e-10)
    same(-t.grad, out["grad_t"], 1e-10)
    same(-r.grad, out["grad_tt"], 1e-10)
    compared = [key for key in out if key.startswith("grad/")]
    assert compared
    for key in compared:
        same(net.get_parameter(key.removeprefix("grad/")).grad, out[key], 1e-10)
    torch.testing.assert_close(net(x, t, given["label"]), net(x, t, given["label"], t))
    with torch.no_grad():
        net.target_time_embedding[2].weight.zero_()
        net.target_time_embedding[2].bias.zero_()
    same(-net(x, t, given["label"]), out["y_no_tt"], 1e-10)


def test_network_of_the_point_tutorial():
    weights, given, out = case("02")
    net = TwinFlowMLP((2,), 24).double()
    net.load_state_dict(weights)
    x, t, r = given["x"].requires_grad_(), times(given["t"]), times(given["tt"])
    y = -net(x, t, None, r)
    same(y, out["y"], 1e-10)
    (y * given["cotangent"]).sum().backward()
    same(x.grad, out["grad_x"], 1e-10)
    source, data = ends(x.detach(), -y.detach(), t)
    same(data, out["x_hat"], 1e-10)
    same(source, out["z_hat"], 1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_any_step_target(order):
    weights, given, out = case("03")
    net = unet(weights)
    x, v, t, r = image(given["x_t"]), -image(given["v_tgt"]), times(given["t"]), times(given["r"])
    with torch.no_grad():
        u = net(x, t, given["label"], r)

        def average(x, t, r):
            return net(x, t, given["label"], r)

        same(-u, out["F"], 1e-10)
        moved = torch.minimum(t + 0.01, r)
        same(1 - moved, out["t_m"].flatten(), 1e-8)
        same(-displacement(average, x + 0.01 * v, moved, r, order), out[f"P_N{order}"], 1e-8)
    target = rcgm_target(average, u, v, x, t, r, order)
    same(-target, out[f"target_N{order}"], 1e-8)
    same(target - u, out[f"clamped_g_N{order}"], 1e-8)


def test_any_step_target_at_equal_times_is_the_velocity():
    weights, given, out = case("03")
    net = unet(weights)
    x, v, t, label = image(given["eq_x_t"]), -image(given["eq_v_tgt"]), times(given["eq_t"]), given["eq_label"]
    assert out["eq_target_official_nan"].isnan().all()
    with torch.no_grad():
        u = net(x, t, label, t)
    same(-rcgm_target(lambda x, t, r: net(x, t, label, r), u, v, x, t, t, 2), out["eq_target_limit"], 1e-8)


@pytest.mark.parametrize(("alpha", "c"), [(1.0, 1e-3), (1.0, 0.1), (1.5, 0.01), (2.0, 1e-3), (0.0, 1e-3), (-2.0, 0.05)])
def test_barron(alpha, c):
    _, given, out = case("04")
    error = given["barron_rms"][:, None].repeat(1, 6).requires_grad_()
    loss = Barron(alpha, c)(Regression(error, torch.zeros_like(error), *[error] * 4))
    loss.sum().backward()
    same(loss, out[f"barron_loss_alpha{alpha}_c{c}"], 1e-10)
    same(error.grad[:, 0], out[f"barron_grad_alpha{alpha}_c{c}"], 1e-10)


def test_squared_error_and_time_weight():
    _, given, out = case("04")
    error = given["barron_rms"][:, None].repeat(1, 6)
    same(SquaredError()(Regression(error, torch.zeros_like(error), *[error] * 4)), out["l2_loss"], 1e-6)
    same(time_weight(times(given["tw_t"]), times(given["tw_r"])), out["tw_weight"], 1e-10)


@pytest.mark.parametrize("most", [0.9, 0.99, 0.999])
def test_average_of_the_weights(most):
    _, _, out = case("04")
    model = flow(torch.nn.Linear(1, 1, bias=False).double(), ema_decay=most)
    used, average = [], []
    with torch.no_grad():
        model.net.weight.zero_()
        model.shadow.reset(model.net)
        for i in range(40):
            used.append(model.ramp)
            model.net.weight.fill_(1.0 + i)
            model._move_shadow()
            average.append(float(model.shadow.weight))
    same(torch.tensor(used, dtype=torch.float64), out[f"ema_decay_used_dmax{most}"], 1e-6)
    same(torch.tensor(average, dtype=torch.float64), out[f"ema_of_1_plus_i_dmax{most}"], 1e-6)


def test_block_sizes():
    """Their second class of recipes has a fifth block in last place, which takes what is left even at a share of 0."""
    _, _, out = case("04")
    seen = set()
    for batch, kind, *sizes in out["block_sizes"].tolist():
        if kind == 0:
            assert block_sizes(batch, [1, 1, 1, 1]) == sizes[:4]
        else:
            assert block_sizes(batch, [1, 1, 1, 1, 0]) == sizes
        seen.add(kind)
    assert seen == {0, 1}


def flow(net, **options):
    if not hasattr(net, "shape"):
        net.shape, net.num_classes = (1,), 0
        net.forward = lambda x, t, cond=None, r=None: net.weight * x
    return TwinFlow(net, torch.optim.Adam, condition_dropout=0.0, **options)


STEPS = {
    "05": {"enhanced_ratio": 0.8, "rectify": 0.75},
    "06": {"ema_decay": 0.0, "enhanced_ratio": 0.5, "enhanced_range": (0.1, 0.7), "order": 1, "loss": SquaredError()},
    "07": {"ema_decay": 1.0, "enhanced_ratio": 4.0, "image_free": True, "rectify": 0.75},
    "08": {"consistency": 0.0, "order": 0, "ema_decay": 0.0},
    "09": {"consistency": 0.5, "enhanced_ratio": 0.3, "order": 3, "loss": Barron(0.5, 0.05)},
}
RTOL = {"05": 1e-6, "06": 1e-6, "07": 1e-6, "08": 1e-9, "09": 1e-9}


@pytest.mark.parametrize("name", STEPS)
def test_whole_step(name):
    weights, given, out = case(name)
    rtol = RTOL[name]
    model = flow(unet(weights, "transformer."), **STEPS[name])
    if model.shadow is not None:
        model.shadow.reset(unet(weights, "ema_transformer."))
        model.ramp = float(given["ema_decay_before"]) if "ema_decay_before" in given else 0.0
    most = 0.8 if name == "09" else 1.0
    none = torch.zeros(0, 64, dtype=torch.float64)
    free = given.get("draw_z_imgfree")
    draws = StepDraws(
        t=1 - most * given["draw_beta_t"].flatten(),
        reach=given["draw_u_r"].flatten(),
        near=given["draw_u_rmul"].flatten(),
        noise=image(given["draw_z"]),
        adv_noise=image(given["draw_z_adv"]),
        twin_noise=image(given.get("draw_z_rect", none)),
        twin_t=1 - given.get("draw_beta_rect", none[:, :1]).flatten(),
        free_noise=None if free is None else image(free),
    )
    terms = model.terms(image(given["x"]), given["label"], draws, given["label_empty"])
    for block, rows in terms.rows.items():
        if block != "one":
            mask = torch.zeros(len(given["x"]))
            mask[rows] = 1
            assert torch.equal(mask, out[f"mask_{block}"].float())
    same(-terms.prediction, out["F"], rtol)
    same(-terms.velocity, out["v_tgt"], rtol)
    same(-terms.target, out["target_final"], rtol)
    same(terms.target[terms.rows["adv"]], -image(out["v"])[terms.rows["adv"]], rtol)
    same(terms.base, out["base_per_sample_weighted"], rtol)
    counted = (
        torch.cat([terms.base[terms.rows[b]] for b in ("mul", "adv")]) if model.objective.order == 0 else terms.base
    )
    same(counted.mean(), out["base_loss"], rtol)
    total = counted.mean()
    if "rect_loss" in out:
        same(-terms.gap, out["rect_G"], rtol)
        same(terms.rectify, out["rect_per_sample"], rtol)
        total = total + model.rectify * terms.rectify.mean()
    else:
        assert terms.rectify is None
    same(total, out["total"], rtol)
    total.backward()
    gradients = {k.removeprefix("grad/"): v for k, v in out.items() if k.startswith("grad/")}
    assert gradients
    largest = max(float(value.abs().max()) for value in gradients.values())
    for key, expected in gradients.items():
        found = model.net.get_parameter(key.removeprefix("transformer.")).grad
        torch.testing.assert_close(found, expected, rtol=10 * rtol, atol=10 * rtol * largest)
    for key, expected in ((k, v) for k, v in out.items() if k.startswith("ema_after/")):
        own = model.shadow.get_buffer(key.removeprefix("ema_after/").removeprefix("ema_transformer.").replace(".", "/"))
        same(own, expected, max(rtol, 1e-9))
    if "ema_decay_after" in out:
        assert model.ramp == pytest.approx(float(out["ema_decay_after"]), rel=1e-9)


def test_step_of_the_tutorial():
    """All losses on the whole batch: the released tutorial, put together from the parts."""
    weights, given, out = case("10")
    net, average = unet(weights, "model."), unet(weights, "ema.")
    label, x1, x0 = given["label"], image(given["x"]), image(given["draw_z"])
    t_p, twin = given["draw_t_uniform"].flatten(), given["draw_t_rect"].flatten()
    t, r = 1 - t_p, 1 - (t_p - given["draw_r_uniform"].flatten() * t_p)
    zero, one, x_t = torch.zeros_like(t), torch.ones_like(t), mix(x0, x1, t)
    u = net(x_t, t, label, r)
    ramp = float(given["ema_decay_before"])
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), net.parameters()):
            slow.lerp_(fast, 1 - ramp)
        u_c, u_e = average(x_t, t, label, t), average(x_t, t, given["label_uncond"], t)
        v = x1 - x0 + 0.5 * (u_c - u_e)
    same(-v, out["v_tgt"], 1e-8)

    def chain(x, t, r):
        return average(x, t, label, r)

    pairs = {"base": (u, rcgm_target(chain, u, v, x_t, t, r, 2)), "fm": (net(x_t, t, label, t), v)}
    jump = net(x0, zero, label, one)
    fake = (x0 + jump).detach()
    same(fake, out["x_fake"], 1e-8)
    pairs["adv"] = net(mix(x0, fake, t), 2 - t, label, 2 - t), fake - x0
    again = mix(image(given["draw_z_rect"]), fake, 1 - twin)
    with torch.no_grad():
        gap = net(again, 1 + twin, label, 1 + twin) - net(again, 1 - twin, label, 1 - twin)
    same(-gap, out["rect_G"], 1e-8)
    pairs["rectify"] = jump, (jump - gap).detach()
    pairs["rcgm_1_to_0"] = jump, rcgm_target(chain, jump, v, x0, zero, one, 2)
    total = 0
    for name, (prediction, target) in pairs.items():
        same(-prediction, out[f"pred_{name}"], 1e-8)
        same(-target, out[f"target_{name}"], 1e-8)
        loss = SquaredError()(Regression(prediction, target, x_t, x0, x1, t))
        same(loss, out[f"per_sample_{name}"], 5e-6)
        total = total + loss.mean()
    same(total, out["total"], 5e-6)
    total.backward()
    for key in (key for key in out if key.startswith("grad/")):
        same(net.get_parameter(key.removeprefix("grad/").removeprefix("model.")).grad, out[key], 5e-6)


@pytest.mark.parametrize("run", range(16))
def test_samplers(run):
    weights, given, out = case("11")
    net, label = unet(weights), given["label"]
    steps, rho, k, *rest = given[f"run{run}_S_rho_k_g0_g1_a_b_c"].tolist()
    style = ("few", "any", "mul")[int(given[f"run{run}_style"])]
    sampler = AnyStepSampler(style, rho, k, tuple(rest[:2]), tuple(rest[2:]))
    renewal = given.get(f"run{run}_noise")
    renewal = None if renewal is None else renewal.reshape(len(renewal), -1, 1, 8, 8)
    with torch.no_grad():
        found = sampler(lambda x, t, r: net(x, t, label, r), image(given["z"]), int(steps), renewal=renewal)
    expected = out[f"run{run}_samples"]
    same(torch.stack(found), expected[1:], 1e-9)


@pytest.mark.parametrize("grid", range(7))
def test_grids_of_the_samplers(grid):
    _, given, out = case("04")
    steps, *rest = given[f"grid{grid}"].tolist()
    times = AnyStepSampler("few", gaps=tuple(rest[:2]), kumaraswamy=tuple(rest[2:])).times(int(steps))
    torch.testing.assert_close(1 - times, out[f"grid{grid}_t"], rtol=0, atol=1e-10)


def test_decoding_with_two_times_and_with_one():
    weights, given, out = case("12")
    x, t, r, label = image(given["x_t"]), times(given["t"]), times(given["r"]), given["label"]
    with torch.no_grad():
        both = {"full": unet(weights)(x, t, label, r), "lora": HalfTime(_Absent(unet(weights)))(x, t, label, r)}
        for name, found in both.items():
            same(-found, out[f"{name}_F"], 1e-10)
            source, data = ends(x, found, t)
            same(data, out[f"{name}_x_hat"], 1e-10)
            same(source, out[f"{name}_z_hat"], 1e-10)


class _Absent(torch.nn.Module):
    """The network without its embedding of r."""

    def __init__(self, net):
        super().__init__()
        self.net, self.shape, self.num_classes = net, net.shape, net.num_classes
        with torch.no_grad():
            net.target_time_embedding[2].weight.zero_()
            net.target_time_embedding[2].bias.zero_()

    def forward(self, x, t, cond):
        return self.net(x, t, cond)
