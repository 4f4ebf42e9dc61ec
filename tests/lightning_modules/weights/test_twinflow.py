"""Folders and releases of TwinFlow's transformers, with random weights: names, loading, and what is refused."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers", minversion="0.37", reason="diffusers is not installed (extra text2image)")

import diffusers

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets import any_step_hosts as hosts
from penstock.lightning_modules.nets.any_step import AnyStep, HalfTime
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.weights import twinflow_text
from penstock.lightning_modules.weights.twinflow import FILE, pretrained, read, save
from penstock.lightning_modules.weights.twinflow_keys import convert, fused, invert, openuni
from penstock.lightning_modules.weights.twinflow_text import PipelineText

TINY = runpy.run_path(str(Path(__file__).with_name("diffusers_hosts.py")))
NAMES = tuple(TINY["HOSTS"])
SECOND = {
    "StableDiffusion3": (
        "time_text_embed_2.timestep_embedder.linear_1.weight",
        "time_text_embed_2.text_embedder.linear_2.bias",
    ),
    "Sana": ("time_embed_2.emb.timestep_embedder.linear_2.weight", "time_embed_2.linear.bias"),
    "QwenImage": ("time_text_embed_2.timestep_embedder.linear_1.bias",),
    "ZImage": ("t_embedder_2.mlp.0.weight", "t_embedder_2.mlp.2.bias"),
}


class Text(TextEncoder):
    dim = TINY["TEXT"] + 1

    def __call__(self, texts, device="cpu"):
        return torch.full((len(texts), 4, self.dim), float(len(texts[0])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pipelines' folders, in shards, by host."""
    path = tmp_path_factory.mktemp("hosts")
    for name in NAMES:
        TINY["transformer"](name).save_pretrained(path / name / "transformer", max_shard_size="60KB")
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folders of any-step transformers whose second embedding has moved, by host."""
    path = tmp_path_factory.mktemp("released")
    for name in NAMES:
        net = AnyStep(getattr(hosts, name)(TINY["transformer"](name), (4, 8, 8)))
        with torch.no_grad():
            for weight in net.net.get_submodule(net.place).second.parameters():
                weight.normal_(std=0.1)
        save(net, path / name)
    return path


def edited(source, target, change):
    """A copy of a transformer's folder with its weights in one file, after `change(state)`."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    state = read(source)
    change(state)
    save_file(state, target / f"{FILE}.safetensors")
    return target


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_pipelines_folder_becomes_an_any_step_flow(folder, name):
    net = pretrained(str(folder / name), size=8)
    host = getattr(hosts, name)(TINY["transformer"](name), (4, 8, 8))
    own, stored = net.state_dict(), host.transformer.state_dict()
    assert own.keys() == AnyStep(host).state_dict().keys()
    plain = {key: value for key, value in invert(own, host.embedding).items() if f"{host.embedding}_2." not in key}
    assert plain.keys() == stored.keys()
    assert all(torch.equal(plain[key], stored[key]) for key in stored)
    assert not any(weight.is_meta for weight in net.parameters())
    assert not any(buffer.is_meta for buffer in net.buffers())
    assert (net.shape, net.training) == ((4, 8, 8), True)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.6])
    cond = torch.rand(2, 4, host.width) + 0.6
    loaded = pretrained(str(folder / name), size=(8, 8), target="none")
    torch.testing.assert_close(loaded(x, t, cond), AnyStep(host)(x, t, cond, t), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_release_loads_with_its_second_embedding_and_names_come_back(released, name):
    net = pretrained(str(released / name), size=8)
    stored = read(released / name)
    assert set(SECOND[name]) <= set(stored)
    state = net.state_dict()
    assert set(convert(stored, net.net.embedding)) == set(state)
    back = invert(state, net.net.embedding)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[key], stored[key]) for key in stored)
    again = convert(back, net.net.embedding)
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_a_release_in_place_of_the_pipelines_weights(folder, released):
    net = pretrained(str(folder / "Sana"), weights=str(released / "Sana"), text=Text(), empty="Generate an image.")
    assert torch.equal(net.net.transformer.time_embed.second.linear.bias, read(released / "Sana")[SECOND["Sana"][1]])
    assert (net.shape, net.net.null_text.unique().item()) == ((4, 8, 8), 18)
    half = pretrained(str(folder / "Sana"), target="half", dtype="bfloat16")
    assert isinstance(half, HalfTime)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_training_checkpoints_give_their_average_unless_asked(released, tmp_path):
    step = tmp_path / "global_step_400"
    step.mkdir()
    edited(released / "Sana", step / "model", lambda state: state["proj_out.bias"].fill_(1.0))
    edited(released / "Sana", step / "ema", lambda state: state["proj_out.bias"].fill_(2.0))
    config = json.loads((step / "ema" / "config.json").read_text())
    wrapper = {**config, "_class_name": "SanaTransformer2DModelWrapper"}
    (step / "ema" / "config.json").write_text(json.dumps(wrapper))
    for options, expected in (({}, 2.0), ({"subfolder": "model"}, 1.0)):
        net = pretrained(str(step), **options)
        assert net.net.transformer.proj_out.bias.unique().item() == expected


def test_openuni_has_prefixes(folder, tmp_path):
    inner = TINY["transformer"]("Sana", seed=1).state_dict()
    text = {"connector.layers.0.weight": torch.ones(2), "projector.bias": torch.ones(3), "meta_queries": torch.ones(4)}
    saved = {f"transformer.{key}": value for key, value in inner.items()} | text
    torch.save({"state_dict": saved}, tmp_path / "openuni.pth")
    net = pretrained(str(folder / "Sana"), weights=str(tmp_path / "openuni.pth"), target="none")
    assert all(torch.equal(value, inner[key]) for key, value in net.transformer.state_dict().items())
    read_by_code = {key if key == "meta_queries" else f"transformer.{key}": value for key, value in saved.items()}
    for state in (saved, read_by_code):
        found, rest = openuni(state)
        assert found.keys() == inner.keys()
        assert rest.keys() == text.keys()
    with pytest.raises(UserError, match=r"weight 'lmm.weight': expected transformer.\*, connector.\*"):
        openuni({**saved, "lmm.weight": torch.ones(1)})


@pytest.mark.parametrize("adapter", ["default", "old"])
def test_adapters_are_added(folder, tmp_path, adapter):
    layer = "transformer_blocks.0.attn.to_q"
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    place = tmp_path if adapter == "default" else tmp_path / "old"
    place.mkdir(exist_ok=True)
    prefix = f"base_model.model.transformer.{layer}"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    base = TINY["transformer"]("QwenImage").state_dict()
    net = pretrained(str(folder / "QwenImage"), 8, target="half", lora=str(tmp_path), adapter=adapter)
    state = net.net.transformer.state_dict()
    torch.testing.assert_close(state[f"{layer}.weight"], base[f"{layer}.weight"] + 2 * b @ a)
    assert all(torch.equal(state[key], value) for key, value in base.items() if key != f"{layer}.weight")
    both = {f"{layer}.lora_{half}.{which}.weight": 0 * x if which == "old" else x
            for half, x in (("A", a), ("B", b)) for which in ("default", "old")}  # fmt: skip
    expected = base[f"{layer}.weight"] + (2 * b @ a if adapter == "default" else 0)
    torch.testing.assert_close(fused(base, both, 2.0, adapter)[f"{layer}.weight"], expected)
    with pytest.raises(UserError, match=f"layer '{layer}' has A only, expected A and B"):
        fused(base, {f"{layer}.lora_A.weight": a})
    with pytest.raises(UserError, match=r"layer 'nowhere' isn't in the transformer"):
        fused(base, {"nowhere.lora_A.weight": a, "nowhere.lora_B.weight": b})
    with pytest.raises(UserError, match=r"is \(32, 2\) times \(2, 31\), expected \(32, 32\)"):
        fused(base, {f"{layer}.lora_A.weight": a[:, 1:], f"{layer}.lora_B.weight": b})
    with pytest.raises(UserError, match=r"adapter 'default': key 'proj_out\.bias', expected <layer>\.lora_A"):
        fused(base, {"proj_out.bias": a})
    with pytest.raises(UserError, match="adapter 'old': no weights of it"):
        fused(base, {f"{layer}.lora_A.default.weight": a}, adapter="old")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj_out.bias"), r"no weight 'proj_out.bias', expected one of shape \(4,\)"),
        (
            lambda state: state.update({"proj_out.biases": torch.ones(4)}),
            r"unknown weight 'proj_out.biases' \(did you mean 'proj_out.bias'\?\)",
        ),
        (
            lambda state: state.update({"proj_out.bias": torch.ones(5)}),
            r"weight 'proj_out.bias' has shape \(5,\), expected \(4,\)",
        ),
        (lambda state: state.pop("time_embed_2.linear.bias"), r"no weight 'time_embed_2.linear.bias'"),
        (
            lambda state: state.update({"time_embed_2.more": torch.ones(1)}),
            r"unknown weight 'time_embed_2.more'",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(released, tmp_path, change, message):
    path = edited(released / "Sana", tmp_path / "edited", change)
    with pytest.raises(UserError, match=r"edited: " + message):
        pretrained(str(path))


def test_what_is_absent_or_of_another_kind_is_named(folder, released, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"/nowhere: no such folder; expected a folder or a hub name like owner/model"):
        pretrained("/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no transformer in it; found nothing, expected transformer/ or ema/"):
        pretrained(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"Sana: no transformer in it; found transformer, expected unet/"):
        pretrained(str(folder / "Sana"), subfolder="unet")
    (tmp_path / "config.json").write_text('{"_class_name": "SanaTransformerModel"}')
    with pytest.raises(
        UserError, match=r"a transformer 'SanaTransformerModel' \(did you mean 'SanaTransformer2DModel'"
    ):
        pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read"):
        pretrained(str(tmp_path))
    with pytest.raises(UserError, match="QwenImage: its transformer has no size of its own, expected a shape"):
        pretrained(str(folder / "QwenImage"))
    with pytest.raises(UserError, match=r"StableDiffusion3: expected float prompt features \(B, L, 20\)"):
        pretrained(str(folder / "StableDiffusion3"), text=Text())
    with pytest.raises(UserError, match=r"weight 'net.time.weight': expected net.transformer.\*"):
        invert({"net.time.weight": torch.ones(1)}, "time_embed")
    path = edited(released / "Sana", tmp_path / "cut", lambda state: None)
    file = path / f"{FILE}.safetensors"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(UserError, match=rf"{FILE}.safetensors: cannot be read, probably cut short"):
        pretrained(str(path))
    file.unlink()
    with pytest.raises(UserError, match=rf"{FILE}.safetensors: no such file, expected weights as safetensors"):
        pretrained(str(path))
    index = json.loads((folder / "Sana" / "transformer" / f"{FILE}.safetensors.index.json").read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    shards = {name: load_file(folder / "Sana" / "transformer" / name) for name in (first, last)}
    for name in shards:
        save_file(shards[first], path / name)
    (path / f"{FILE}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{re.escape(last)}: no weight '.*', expected as {FILE}"):
        pretrained(str(path))
    index["weight_map"] = dict.fromkeys(index["weight_map"], f"../{first}")
    (path / f"{FILE}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"shard '../{re.escape(first)}', expected the name of a file"):
        pretrained(str(path))
    (tmp_path / "code.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"code.pth: (holds objects other|cannot be read)"):
        read(tmp_path / "code.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list.pth: holds a list, expected OpenUni's weights by name"):
        read(tmp_path / "list.pth")
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(UserError, match=r"adapter_config.json: no 'lora_alpha', expected r and lora_alpha"):
        pretrained(str(released / "Sana"), lora=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "use_dora": true}')
    with pytest.raises(UserError, match=r"adapter_config.json: use_dora, expected a plain adapter of one rank"):
        pretrained(str(released / "Sana"), lora=str(tmp_path))
    monkeypatch.setattr(diffusers, "__version__", "0.31.0")
    with pytest.raises(
        UserError, match=r"QwenImageTransformer2DModel needs diffusers 0.37 or later, found 0.31.0: pip"
    ):
        pretrained(str(folder / "QwenImage"), 8)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="needs diffusers, which is not installed: pip install"):
        pretrained(str(folder / "QwenImage"), 8)


@pytest.mark.parametrize("kind", ["StableDiffusion3", "Sana", "QwenImage", "ZImage"])
def test_pipelines_features_are_packed_for_their_transformer(monkeypatch, kind):
    def encode_prompt(self, texts, *more, device, max_sequence_length, do_classifier_free_guidance=True):
        assert do_classifier_free_guidance == (kind == "QwenImage")
        rows = [torch.full((min(len(text) + 1, max_sequence_length), 12), 2.0) for text in texts]
        if kind == "ZImage":
            return rows, []
        size = max(map(len, rows)) if kind == "QwenImage" else max_sequence_length
        tokens = torch.stack([torch.cat([row, torch.zeros(size - len(row), 12)]) for row in rows])
        if kind == "StableDiffusion3":
            return tokens, None, torch.full((len(texts), 20), 3.0), None
        mask = tokens[..., 0] != 0
        return (tokens, mask, None, None) if kind == "Sana" else (tokens, None if mask.all() else mask)

    pipeline = type(f"{kind}Pipeline", (), {"encode_prompt": encode_prompt, "to": lambda self, device: self})()
    monkeypatch.setattr(twinflow_text, "_pipeline", lambda path, dtype: pipeline)
    text = PipelineText("a/folder", length=4)
    cond = text(["", "ab", "a long one"])
    width = 20 if kind == "StableDiffusion3" else 13
    assert (cond.shape, text.dim) == ((3, 4 + (kind == "StableDiffusion3"), width), width)
    host = getattr(hosts, kind)(TINY["transformer"](kind), (4, 8, 8), text([""])[0])
    if kind == "StableDiffusion3":
        assert (cond[:, 0].unique().item(), cond[0, 1:, :12].sum()) == (3, 24)
    else:
        assert cond[..., -1].sum(1).tolist() == [1, 3, 4]
        assert torch.equal(text([""])[0, :, -1], torch.tensor([1.0, 0, 0, 0]))
    assert host(torch.randn(3, 4, 8, 8), torch.rand(3), cond).isfinite().all()
    pipeline.__class__.__name__ = "FluxPipeline"
    with pytest.raises(UserError, match="a/folder: a FluxPipeline, expected one of StableDiffusion3Pipeline, Sana"):
        PipelineText("a/folder")


def test_no_pipeline_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no pipeline can be read from it \(.*\); expected model_index.json"):
        PipelineText(str(tmp_path))
    with pytest.raises(UserError, match="/nowhere: no such folder; expected a pipeline's folder or a hub name"):
        PipelineText("/nowhere")
