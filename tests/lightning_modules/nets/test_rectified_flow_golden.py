"""NCSN++ against numbers of the official Rectified Flow implementation, through the checkpoint converter."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.schedules import LinearWarmup
from penstock.lightning_modules.weights.rectified_flow import convert, invert

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "rectified_flow"
DDPMPP = {"shape": (3, 16, 16), "width": 8, "mult": (1, 2), "blocks": 2, "attention": (8,)}
NCSNPP = {
    **{"shape": (3, 16, 16), "width": 8, "mult": (1, 1, 2), "blocks": 1, "attention": (8,)},
    **{"embedding": "fourier", "fir": True, "progressive": True, "divide_by_time": True},
}
CASES = {"01_ddpmpp_forward": (DDPMPP, 1000, 50.0), "02_ncsnpp256_forward": (NCSNPP, 2000, 378.0)}
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def golden(name, **options):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    net = NCSNpp(**options)
    net.load_state_dict(convert(weights))
    return net, tensors, weights


def gradients_by_official_name(net):
    return invert({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()})


@pytest.mark.parametrize("name", CASES)
def test_forward_embedding_and_gradients(name):
    net, tensors, _ = golden(name, **CASES[name][0])
    net.double()
    x = tensors["in/x"].double().requires_grad_()
    t = tensors["in/t"]
    v = net(x, t)
    torch.testing.assert_close(v, tensors["out/v"], **EXACT)
    torch.testing.assert_close(net.time.features(t), tensors["out/emb"], **EXACT)
    (v * tensors["in/cotangent"]).sum().backward()
    torch.testing.assert_close(x.grad, tensors["out/grad_x"], **EXACT)
    grads = gradients_by_official_name(net)
    expected = {key.removeprefix("out/grad/"): value for key, value in tensors.items() if key.startswith("out/grad/")}
    assert len(expected) == 5
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_float32_forward(name):
    net, tensors, _ = golden(name, **CASES[name][0])
    torch.testing.assert_close(net(tensors["in/x"], tensors["in/t"].float()), tensors["out/v_f32"], rtol=0, atol=1e-4)


def test_not_centred_forward():
    net, tensors, _ = golden("02_ncsnpp256_forward", **NCSNPP, centred=False)
    v = net.double()(tensors["in/x"].double(), tensors["in/t"])
    torch.testing.assert_close(v, tensors["out/v_not_centered"], **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_inverse_gives_the_official_state_dict_back(name):
    options, num_scales, sigma_max = CASES[name]
    net, _, weights = golden(name, **options)
    restored = invert(net.state_dict(), num_scales, sigma_max)
    assert restored.keys() == weights.keys()
    torch.testing.assert_close(restored.pop("sigmas"), weights.pop("sigmas"), rtol=1e-12, atol=0)
    assert all(torch.equal(restored[key], value) for key, value in weights.items())


EPS = 1e-3


@pytest.mark.parametrize("variant", ["rf", "rf_sum", "reflow_uniform", "distill_t0", "distill_t1", "distill_k"])
def test_losses(variant):
    net, tensors, _ = golden("03_losses", **DDPMPP)
    net.double()
    x0, x1 = tensors["in/z0"], tensors["in/x1"]
    t = {
        "distill_t0": torch.full_like(tensors["in/u"], EPS),
        "distill_t1": torch.ones_like(tensors["in/u"]),
        "distill_k": tensors["in/j"].double() * (1 - EPS) / tensors["in/k"] + EPS,
    }.get(variant, tensors["in/u"] * (1 - EPS) + EPS)
    torch.testing.assert_close(999 * t, tensors[f"out/{variant}/labels"], **EXACT)
    s = t[:, None, None, None]
    x_t = s * x1 + (1 - s) * x0
    torch.testing.assert_close(x_t, tensors[f"out/{variant}/x_t"], **EXACT)
    v = net(x_t, t)
    torch.testing.assert_close(v, tensors[f"out/{variant}/v"], **EXACT)
    squares = (v - (x1 - x0)).square().flatten(1)
    loss = (0.5 * squares.sum(1) if variant == "rf_sum" else squares.mean(1)).mean()
    torch.testing.assert_close(loss, tensors[f"out/{variant}/loss"], **EXACT)
    loss.backward()
    grads = gradients_by_official_name(net)
    prefix = f"out/{variant}/grad/"
    expected = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert len(expected) == 3
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


def test_optimiser_with_warmup_and_clipping():
    tensors = load_file(GOLDEN / "06_optimizer_ema.safetensors")
    parameters = [torch.nn.Parameter(tensors[f"in/p{i}"].clone()) for i in range(3)]
    optimizer = torch.optim.Adam(parameters, lr=tensors["in/lr"].item(), betas=(0.9, 0.999), eps=1e-8)
    schedule = LinearWarmup(optimizer, int(tensors["in/warmup"]))
    for step in range(6):
        for i, p in enumerate(parameters):
            p.grad = tensors[f"in/grad_step{step}_p{i}"].clone()
        torch.nn.utils.clip_grad_norm_(parameters, tensors["in/grad_clip"].item())
        assert optimizer.param_groups[0]["lr"] == pytest.approx(tensors[f"out/lr_step{step}"].item(), rel=1e-12)
        optimizer.step()
        schedule.step()
        for i, p in enumerate(parameters):
            torch.testing.assert_close(p.data, tensors[f"out/step{step}_p{i}"], **EXACT)
