"""Official checkpoints of PIIP-LLaVA: names both ways, folders of shards, what is refused."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed (extra llava)")

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.language_model import WordLlama
from penstock.lightning_modules.nets.piip.clip import ClipBranch
from penstock.lightning_modules.nets.piip.convnext import ConvNextBranch
from penstock.lightning_modules.nets.piip.llava import LlavaNet
from penstock.lightning_modules.nets.piip.llava_tower import LlavaTower
from penstock.lightning_modules.weights.piip_llava import official_state, own_state, read_folder

TOWER = "model.vision_tower.vision_tower."


def net(convolutional: bool) -> LlavaNet:
    torch.manual_seed(0)
    own = {"weights": "random", "groups": 2, "num_heads": 2}
    branches = [ClipBranch("vit_base_patch16_clip_quickgelu_224", 32, embed_dim=64, depth=4, **own)]
    if convolutional:
        shape = {"depths": [1, 1, 1, 1], "embed_dims": [32] * 4}
        branches.append(ConvNextBranch("convnext_atto", 64, [4, 3], "random", **shape))
    else:
        branches.append(ClipBranch("vit_base_patch16_clip_quickgelu_224", 64, embed_dim=32, depth=2, **own))
    net = LlavaNet(LlavaTower(branches), WordLlama("a", dim=32, depth=1, heads=2, hidden=32))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def layer(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def clip(branch: int, dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Of transformers' `CLIPVisionModel` of 14x14 patches."""
    place = f"{TOWER}branch{branch}.clip_model"
    found = {f"{place}.embeddings.class_embedding": (dim,), f"{place}.embeddings.position_ids": (1, 197)}
    found |= layer(f"{place}.embeddings.patch_embedding", dim, 3, 16, 16, bias=False)
    found |= layer(f"{place}.embeddings.position_embedding", 197, dim, bias=False)
    found |= layer(f"{place}.pre_layrnorm", dim) | layer(f"{place}.post_layernorm", dim)
    for k in range(depth):
        block = f"{place}.encoder.layers.{k}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= layer(f"{block}.self_attn.{part}", dim, dim)
        found |= layer(f"{block}.mlp.fc1", 4 * dim, dim) | layer(f"{block}.mlp.fc2", dim, 4 * dim)
        found |= layer(f"{block}.layer_norm1", dim) | layer(f"{block}.layer_norm2", dim)
    return found


def convnext(dim: int) -> dict[str, tuple[int, ...]]:
    """Of timm's of one block a stage, with the factors of channels under the authors' name."""
    place = f"{TOWER}branch2.convnext_model"
    found = layer(f"{place}.stem.0", dim, 3, 4, 4) | layer(f"{place}.stem.1", dim) | layer(f"{place}.head.norm", dim)
    for k in range(4):
        stage = f"{place}.stages.{k}"
        if k:
            found |= layer(f"{stage}.downsample.0", dim) | layer(f"{stage}.downsample.1", dim, dim, 2, 2)
        found |= {f"{stage}.blocks.0.weight": (dim,)} | layer(f"{stage}.blocks.0.conv_dw", dim, 1, 7, 7)
        found |= layer(f"{stage}.blocks.0.mlp.fc1", 4 * dim, dim, 1, 1)
        found |= layer(f"{stage}.blocks.0.mlp.fc2", dim, 4 * dim, 1, 1) | layer(f"{stage}.blocks.0.norm", dim)
    return found


def unit(k: int, dims: tuple[int, int], heads: int = 16, points: int = 4) -> dict[str, tuple[int, ...]]:
    place, (a, b) = f"{TOWER}interactions.{k}.interaction_units_12", dims
    found = layer(f"{place}.branch2to1_proj", a, b) | layer(f"{place}.branch1to2_proj", b, a)
    for name, dim in (("branch2to1_injector", a), ("branch1to2_injector", b)):
        own = f"{place}.{name}"
        found |= {f"{own}.ca_weight": (dim,), f"{own}.cffn_weight": (dim,)}
        for norm in ("query_norm", "feat_norm", "ffn_norm"):
            found |= layer(f"{own}.{norm}", dim)
        found |= layer(f"{own}.attn.sampling_offsets", 2 * heads * points, dim)
        found |= layer(f"{own}.attn.attention_weights", heads * points, dim)
        found |= layer(f"{own}.attn.value_proj", dim // 2, dim) | layer(f"{own}.attn.output_proj", dim, dim // 2)
        found |= layer(f"{own}.ffn.fc1", dim // 4, dim) | layer(f"{own}.ffn.fc2", dim, dim // 4)
        found |= layer(f"{own}.ffn.dwconv.dwconv", dim // 4, 1, 3, 3)
    return found


def official(convolutional: bool, vocabulary: int) -> dict[str, Tensor]:
    found = clip(1, 64, 4) | (convnext(32) if convolutional else clip(2, 32, 2))
    found |= unit(0, (64, 32)) | unit(1, (64, 32))
    for k, dim in enumerate((64, 32), 1):
        place = f"model.mm_projector.branch{k}"
        found |= layer(f"{place}.1", 32, dim) | layer(f"{place}.3", 32) | layer(f"{place}.6", 32, 32)
    found |= {"model.embed_tokens.weight": (vocabulary, 32), "lm_head.weight": (vocabulary, 32)}
    found |= {"model.norm.weight": (32,)}
    found |= {f"model.layers.0.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    found |= {f"model.layers.0.self_attn.{part}_proj.weight": (32, 32) for part in "qkvo"}
    found |= {f"model.layers.0.mlp.{part}_proj.weight": (32, 32) for part in ("gate", "up", "down")}
    found |= {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in found.items()}


UNREAD = re.compile(r"position_ids|post_layernorm|inv_freq|convnext_model\.head")


@pytest.mark.parametrize("convolutional", [False, True])
def test_names_both_ways(convolutional):
    own = net(convolutional)
    state = official(convolutional, own.language.net.config.vocab_size)
    found = own_state(state)
    own.load_state_dict(found)
    kept = {name: value for name, value in state.items() if not UNREAD.search(name)}
    back = official_state(own.state_dict())
    assert back.keys() == kept.keys()
    assert all(back[name].equal(value) for name, value in kept.items())
    again = own_state(back)
    assert all(again[name].equal(value) for name, value in found.items())
    branch = own.tower.pyramid.branches[0]
    table = state[f"{TOWER}branch1.clip_model.embeddings.position_embedding.weight"]
    assert torch.cat([branch.cls_position[0], branch.pos_embed[0]]).equal(table)
    query = state[f"{TOWER}branch1.clip_model.encoder.layers.2.self_attn.q_proj.weight"]
    assert branch.blocks[2].attn.qkv.weight[:64].equal(query)
    gate = state[f"{TOWER}interactions.1.interaction_units_12.branch1to2_injector.cffn_weight"]
    assert own.tower.pyramid.interactions[1][0].fine.ffn_gate.equal(gate)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_and_single_files(tmp_path, kind):
    state = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}
    whole, index = ("model", "model.safetensors") if kind == "safetensors" else ("pytorch_model", "pytorch_model.bin")
    save = save_file if kind == "safetensors" else torch.save
    save(state, tmp_path / f"{whole}.{kind}")
    assert read_folder(tmp_path).keys() == state.keys()
    names = {name: f"{whole}-{k}.{kind}" for k, name in enumerate(state)}
    for name, file in names.items():
        save({name: state[name]}, tmp_path / file)
    (tmp_path / f"{index}.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / f"{whole}.{kind}").unlink()
    assert all(read_folder(tmp_path)[name].equal(value) for name, value in state.items())


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"found no weights, expected one of model\.safetensors"),
        ({"model.safetensors": b"no"}, r"model\.safetensors: cannot be read as weights"),
        ({"pytorch_model.bin": pickle.dumps(Harmful())}, r"pytorch_model\.bin: cannot be read as weights"),
        ({"model.safetensors.index.json": b"{}"}, r"index\.json: cannot be read .*expected an object with weight_map"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../a.safetensors"}}'},
            r"names the file '\.\./a\.safetensors', expected files of its own folder",
        ),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "a.safetensors"}}'},
            r"a\.safetensors: no such file, though the index names it",
        ),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, files, message, capsys):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)
    assert not capsys.readouterr().out
