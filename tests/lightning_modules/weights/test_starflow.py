"""Official files of STARFlow, STARFlow-V and TARFlow: layouts as published, strict names, the same outputs."""

import pytest
import torch
from golden_files import golden

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser, starflow_v_7b_denoiser
from penstock.lightning_modules.nets.starflow import STARFlow, starflow_v_7b, starflow_xl, starflow_xxl
from penstock.lightning_modules.nets.tarflow import TARFlow, tarflow_afhq
from penstock.lightning_modules.weights import starflow
from penstock.lightning_modules.weights.starflow import convert, invert, pretrained, pretrained_denoiser

TINY = {"dim": 32, "depths": (1, 1), "head_dim": 32, "text_dim": 5}


def layout(channels, dims, layers, places, text=2048):
    """Names and shapes of an official file, from the published table."""
    found = {"var": (1024, channels), "feat_rope.freqs_cos": (places, 64), "feat_rope.freqs_sin": (places, 64)}
    for i, (d, depth) in enumerate(zip(dims, layers)):
        own = {"attn_mask": (places, places), "sos_embed": (1, 1, channels), "final_norm.weight": (d,)}
        own |= {"proj_in.weight": (d, channels), "proj_in.bias": (d,)}
        own |= {"proj_out.weight": (2 * channels, d), "proj_out.bias": (2 * channels,)}
        if i == len(dims) - 1:
            own |= {"proj_txt.weight": (d, text), "proj_txt.bias": (d,)}
        found |= {f"blocks.{i}.{key}": shape for key, shape in (own | of_layers(d, depth)).items()}
    return found


def of_layers(d, depth):
    found = {}
    for i in range(depth):
        weights = {"attention.qkv": (3 * d, d), "attention.proj": (d, d), "mlp.main.0": (4 * d, d)}
        for name, shape in (weights | {"mlp.main.2": (d, 4 * d)}).items():
            found |= {f"attn_blocks.{i}.{name}.weight": shape, f"attn_blocks.{i}.{name}.bias": shape[:1]}
        for name in ("attention.norm", "mlp.norm"):
            found |= {f"attn_blocks.{i}.{name}.{leaf}": (d,) for leaf in ("weight", "bias")}
    return found


def denoiser_layout(d=3072, channels=48, text=2048):
    found = {"proj_in.weight": (d, channels), "proj_in.bias": (d,), "proj_out.weight": (channels, d)}
    found |= {"proj_out.bias": (channels,), "proj_txt.weight": (d, text), "proj_txt.bias": (d,)}
    found |= {"final_norm.weight": (d,)} | of_layers(d, 8)
    return {f"learnable_self_denoiser.{key}": shape for key, shape in found.items()}


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def meta(wanted):
    return {key: torch.empty(shape, device="meta") for key, shape in wanted.items()}


LAYERS = (2, 2, 2, 2, 2, 24)
IMAGE = layout(4, [3072] * 6, LAYERS, 1152)
VIDEO = layout(48, [3072] * 5 + [4096], LAYERS, 1280) | denoiser_layout()


@pytest.mark.parametrize(
    ("wanted", "entries", "net", "denoiser"),
    [
        (IMAGE, 455, starflow_xxl, None),
        (VIDEO, 558, starflow_v_7b, starflow_v_7b_denoiser),
        (layout(4, [2048] * 6, (2, 2, 2, 2, 2, 18), 1025, 1001), None, starflow_xl, None),
    ],
    ids=["image", "video", "imagenet"],
)
def test_published_names_and_shapes_are_ours(wanted, entries, net, denoiser):
    assert entries in (None, len(wanted))
    flow, other = convert(meta(wanted))
    with torch.device("meta"):
        assert shapes(flow) == shapes(net().state_dict())
        assert shapes(other) == ({} if denoiser is None else shapes(denoiser().state_dict()))
    some = {name: build for name, build in starflow.FLOWS.items() if name in ("starflow_xl", net.__name__)}
    assert starflow.official.preset(flow, some) == net.__name__
    back = invert(flow, other)
    assert back.keys() == {key for key in wanted if key != "var" and "attn_mask" not in key and "freqs" not in key}


def test_tarflows_file_has_places_classes_and_variances():
    with torch.device("meta"):
        own = tarflow_afhq().state_dict()
    masks = {f"blocks.{i}.attn_mask": torch.empty(1024, 1024, device="meta") for i in range(8)}
    flow, denoiser = convert({**own, **masks})
    assert (flow.keys(), denoiser) == (own.keys(), {})
    assert {
        "var",
        "blocks.7.pos_embed",
        "blocks.0.class_embed",
        "blocks.7.attn_blocks.7.mlp.main.2.bias",
    } <= flow.keys()
    some = {name: build for name, build in starflow.FLOWS.items() if name in ("tarflow_imagenet64", "tarflow_afhq")}
    assert starflow.official.preset(flow, some) == "tarflow_afhq"


@pytest.fixture
def small(monkeypatch):
    """Presets that a test can fill."""
    monkeypatch.setattr(starflow, "FLOWS", {"tiny": lambda: STARFlow((3, 2, 2, 3), **TINY)})
    monkeypatch.setattr(starflow, "DENOISERS", {"tiny": lambda: FlowDenoiser(2, 32, 1, 32, 5)})
    torch.manual_seed(0)
    return STARFlow((3, 2, 2, 3), **TINY), FlowDenoiser(2, 32, 1, 32, 5)


def test_a_file_fills_both_networks(small, tmp_path):
    net, denoiser = small
    extra = {"var": torch.ones(4, 2), "blocks.0.attn_mask": torch.ones(3, 3), "feat_rope.freqs_cos": torch.ones(3, 4)}
    torch.save({**invert(net.state_dict(), denoiser.state_dict()), **extra}, tmp_path / "v.pth")
    found, other = pretrained(str(tmp_path / "v.pth")), pretrained_denoiser(str(tmp_path / "v.pth"))
    x, text = torch.randn(2, 3, 2, 2, 3), torch.randn(2, 4, 5)
    assert torch.equal(found(x, text).z, net(x, text).z)
    tokens, grid = net.tokens(x)
    assert torch.equal(other(tokens, grid, text), denoiser(tokens, grid, text))


def test_files_that_do_not_fit(small, tmp_path):
    net, denoiser = small
    state, file = invert(net.state_dict(), denoiser.state_dict()), tmp_path / "f.pth"
    cases = {
        "unexpected key 'optimizer.step'": {**state, "optimizer.step": torch.ones(1)},
        "fits none of tiny; nearest is tiny, but blocks.0.proj_in.weight": {
            **state,
            "blocks.0.proj_in.weight": torch.ones(7, 2),
        },
        "no flat state dict of tensors": {"model": state},
    }
    for line, content in cases.items():
        torch.save(content, file)
        with pytest.raises(UserError, match=line):
            pretrained(str(file))
    torch.save(net.state_dict(), file)
    with pytest.raises(UserError, match="expected a file of STARFlow-V"):
        pretrained_denoiser(str(file))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"f\.pth: "):
        pretrained(str(file))
    with pytest.raises(UserError, match="no such file"):
        pretrained(str(tmp_path / "absent.pth"))


def test_recorded_weights_of_the_released_class_give_its_outputs():
    weights, given, out = golden("starflow_v", "01")
    flow, denoiser = convert(weights)
    net = STARFlow((4, 3, 2, 3), 32, (1, 1, 1, 2), 64, 32, 5, side=4)
    net.load_state_dict(flow)
    FlowDenoiser(3, 32, 2, 32, 5, 4).load_state_dict(denoiser)
    z = net.double()(given["x"].double(), given["text"].double()).z
    torch.testing.assert_close(z, out["z"], rtol=0, atol=1e-10)
    weights, given, out = golden("starflow", "09")
    net = TARFlow((3, 6, 6), 2, 32, 3, 2, 5, 16)
    net.load_state_dict(convert(weights)[0])
    tokens, _ = net.tokens(net.double()(given["x"].double(), given["class_index"]).z)
    torch.testing.assert_close(tokens[:, 0], out["z"], rtol=0, atol=1e-10)
