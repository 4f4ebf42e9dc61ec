"""Metrics of GS-Jacobi against another way to them: laws token by token, singular values of numpy."""

import math

import numpy as np
import pytest
import torch
import yaml

from penstock.lightning_modules.autoregressive_module import AutoregressiveModule
from penstock.lightning_modules.build import build
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.inverse import Jacobi
from penstock.lightning_modules.gs_jacobi import Metrics, choose, config, measure, read
from penstock.lightning_modules.nets.autoregressive import Decoder
from penstock.lightning_modules.nets.starflow import STARFlow
from penstock.lightning_modules.nets.tarflow import TARFlow


def noisy(net, seed=0):
    torch.manual_seed(seed)
    for block in net.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    return net.double()


def clips():
    return noisy(STARFlow((3, 2, 4, 4), 32, (1, 2), head_dim=32, patch=2, text_dim=8))


def spectral(x):
    return np.linalg.svd(x.numpy(), compute_uv=False)[0]


@torch.no_grad()
def test_metrics_of_clips():
    net = clips()
    x, text = torch.randn(5, 3, 2, 4, 4).double(), torch.randn(5, 3, 8).double()
    shallow, deep = measure(net, x, text)
    flow = net(x, text)
    for i, (found, frames) in enumerate(((shallow, 1), (deep, 3))):
        block, order = net.blocks[i], (lambda t: t.flip(2)) if net.flips(i) else (lambda t: t)
        u, z = (order(t).reshape(-1, frames * 4, 8) for t in (flow.states[i], flow.states[i + 1]))
        decoder = Decoder(block, (frames, 2, 2), len(u), text if i else None)
        start = block.sos_embed.expand(len(u), -1, -1)
        sigma = torch.cat([decoder(torch.cat([start, u], 1)[:, k : k + 1], k)[1] for k in range(u.shape[1])], 1)
        scale, mean = block.proj_out.weight[:8], block.proj_out.weight[8:]
        expected = spectral(scale) * spectral((u / sigma).mean(0)) + spectral(mean)
        assert found.crm == pytest.approx(expected, rel=1e-6)
        guesses = {"noise": z, "zeros": 0 * z}
        if frames > 1:
            guesses["frame"] = torch.cat([z[:, :4], u[:, :8]], 1)
        assert found.igm.keys() == guesses.keys()
        for name, guess in guesses.items():
            mu, sigma = decoder(torch.cat([start, guess[:, :-1]], 1), 0)
            assert found.igm[name] == pytest.approx(spectral((mu + sigma * z - u).mean(0)), rel=1e-6)
    assert (shallow.tokens, deep.tokens) == (4, 12)


@torch.no_grad()
def test_metrics_of_a_flow_whose_first_token_stays():
    net = noisy(TARFlow((2, 4, 4), 2, 32, 1, 1, 0, 32))
    x = torch.randn(6, 2, 4, 4).double()
    (found,) = measure(net, x)
    u, flow = net.tokens(x)[0][:, 0], net(x)
    z = net.tokens(flow.z)[0][:, 0]
    alpha = flow.logdets[0][:, 0].exp()
    assert torch.equal(alpha[:, 0], torch.ones_like(alpha[:, 0]))
    scale, mean = net.blocks[0].proj_out.weight.chunk(2)
    assert found.crm == pytest.approx(spectral(scale) * spectral((alpha * u).mean(0)) + spectral(mean), rel=1e-6)
    guess = torch.cat([u[:, :1], torch.zeros_like(z[:, 1:])], 1)
    mu, sigma = Decoder(net.blocks[0], (1, 2, 2), 6)(guess[:, :-1], 0)
    assert found.igm["zeros"] == pytest.approx(spectral((mu + sigma * z[:, 1:] - u[:, 1:]).mean(0)), rel=1e-6)
    assert found.tokens == 3


def test_a_start_that_overflows_is_not_chosen():
    net = noisy(TARFlow((2, 4, 4), 2, 32, 1, 1, 0, 32))
    with torch.no_grad():
        net.blocks[0].proj_out.bias[:8] = -800.0
    (found,) = measure(net, torch.randn(6, 2, 4, 4).double())
    assert set(found.igm.values()) == {math.inf}
    assert choose([Metrics(1.0, {"noise": math.inf, "zeros": 3.0}, 8)])[0].start == "zeros"


PAPER = {
    "img128cond": ([5.22, 5.63, 2.47, 10.93, 7.74, 7.35, 56.57, 4.05], [6]),
    "afhq": ([6.33, 6.28, 8.16, 7.94, 9.01, 10.27, 9.36, 42.60], [7]),
    "img64uncond": ([50.71, 2.42, 2.29, 3.38, 1.77, 1.33, 33.62, 4.44], [0, 6]),
    "img64cond": ([74.58, 4.88, 0.72, 0.96, 4.05, 2.68, 1.62, 10.46], [0]),
}


@pytest.mark.parametrize("name", PAPER)
def test_segments_are_for_the_blocks_that_the_paper_took(name):
    crm, tough = PAPER[name]
    found = choose([Metrics(value, {"noise": 2.0, "zeros": 1.0, "frame": 3.0}, 1024) for value in crm], clamp=3)
    assert [i for i, inverse in enumerate(found) if inverse.chunk == 128] == tough
    assert {inverse.chunk for inverse in found} == {128, 1024}
    assert all(inverse.max_sweeps == (32 if inverse.chunk == 128 else 10) for inverse in found)
    assert all(inverse.start == "zeros" and inverse.clamp == 3 for inverse in found)


def test_blocks_that_are_alike_are_swept_as_a_whole():
    found = choose([Metrics(1.0, {"noise": 0.0, "zeros": 1.0}, 10)] * 4)
    assert {inverse.chunk for inverse in found} == {10}
    assert {inverse.start for inverse in found} == {"noise"}


@torch.no_grad()
def test_chosen_inverses_invert_and_come_back_from_a_file(tmp_path):
    net = clips()
    x, text = torch.randn(5, 3, 2, 4, 4).double(), torch.randn(5, 3, 8).double()
    *shallow, deep = choose(measure(net, x, text), 4, 1e-12, 100, 100)
    assert deep.chunk in (3, 12)
    found, _ = net.decode(net(x, text).z, deep, shallow, text)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)
    file = tmp_path / "inverse.yaml"
    file.write_text(yaml.safe_dump(config([*shallow, deep])))
    settings = read(file)
    model = build({"model": MODEL | {"init_args": MODEL["init_args"] | settings}}, "model")[0]
    assert isinstance(model, AutoregressiveModule)
    assert (model.inverse, model.shallow) == (deep, shallow)
    assert isinstance(model.inverse, Jacobi)


@pytest.mark.parametrize("text", [None, "a: [", "3", "{}", "inverse: {}\nother: 1", "\xff"])
def test_files_that_hold_no_inverses(tmp_path, text):
    file = tmp_path / "inverse.yaml"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"inverse=.*inverse\.yaml: .*expected .*inverse and shallow"):
        read(file)


MODEL = {
    "class_path": "penstock.lightning_modules.starflow_v.STARFlowV",
    "init_args": {
        "net": {
            "class_path": "penstock.lightning_modules.nets.starflow.STARFlow",
            "init_args": {"shape": [3, 2, 4, 4], "dim": 32, "depths": [1, 2], "head_dim": 32, "patch": 2},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    },
}
