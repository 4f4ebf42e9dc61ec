"""Checkpoints of PIIP-LLaVA (github.com/OpenGVLab/PIIP, folders of OpenGVLab/PIIP-LLaVA_*) as `nets.piip.llava`'s."""

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.clip import timm_state
from penstock.lightning_modules.weights.piip import own_name

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = re.compile(r"^model\.mm_projector\.branch(\d)\.([136])\.")
LAYERS = {"1": "first", "3": "norms", "6": "second"}
CLIP = re.compile(r"^branch(\d)\.clip_model\.(.*)")
SCALE = re.compile(r"^(branch\d\.convnext_model\.stages\.\d\.blocks\.\d+)\.weight$")
UNUSED = r"\.position_ids$|\.post_layernorm\.|\.convnext_model\.head\.|\.rotary_emb\.inv_freq$"
"""Places of positions, the norm behind CLIP's blocks, that of ConvNeXt's head, rotary frequencies."""
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = ("model.safetensors", "pytorch_model.bin")


def own_state(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `LlavaNet` with a Llama from that of an official checkpoint."""
    own, clips = {}, {}
    for name, value in official.items():
        if re.search(UNUSED, name):
            continue
        if part := PROJECTOR.match(name):
            own[f"projector.{LAYERS[part[2]]}.{int(part[1]) - 1}.{name[part.end() :]}"] = value
        elif not name.startswith(TOWER):
            own[f"language.net.{name}"] = value
        elif part := CLIP.match(name.removeprefix(TOWER)):
            clips.setdefault(int(part[1]) - 1, {})[part[2]] = value
        else:
            own["tower." + own_name(SCALE.sub(r"\1.gamma", name.removeprefix(TOWER)))] = value
    for branch, state in clips.items():
        own |= {f"tower.pyramid.branches.{branch}.{name}": value for name, value in _clip(state).items()}
    return own


def _clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a `ClipBranch`, whose class token's position stands apart."""
    own = timm_state(state)
    if (table := own.get("pos_embed")) is None:
        return own
    return own | {"pos_embed": table[:, 1:], "cls_position": table[:, :1]}


def official_state(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official names and shapes of a `LlavaNet`'s state dict; what the official code never reads is left out."""
    found = {}
    for name, value in own.items():
        if name.startswith("language.net."):
            found[name.removeprefix("language.net.")] = value
        elif name.startswith("projector."):
            _, layer, branch, end = name.split(".")
            number = next(key for key, own_layer in LAYERS.items() if own_layer == layer)
            found[f"model.mm_projector.branch{int(branch) + 1}.{number}.{end}"] = value
        else:
            found |= {f"{TOWER}{key}": part for key, part in _of_tower(name.removeprefix("tower.pyramid."), own)}
    return found


BACK = [
    (r"^interactions\.(\d+)\.0\.", r"interactions.\1.interaction_units_12."),
    (r"\.to_coarse\.", ".branch2to1_proj."),
    (r"\.to_fine\.", ".branch1to2_proj."),
    (r"\.coarse\.", ".branch2to1_injector."),
    (r"\.fine\.", ".branch1to2_injector."),
    (r"\.attn_gate$", ".ca_weight"),
    (r"\.ffn_gate$", ".cffn_weight"),
    (r"\.ffn\.conv\.", ".ffn.dwconv.dwconv."),
]
OF_CLIP = [
    (r"^norm_pre\.", "pre_layrnorm."),
    (r"^patch_embed\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
]


def _of_tower(name: str, own: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Official names and values of a tensor of the pyramid, which makes several of one that is joined here."""
    value = own[f"tower.pyramid.{name}"]
    if not name.startswith("branches."):
        return [(_renamed(name, BACK), value)]
    _, branch, rest = name.split(".", 2)
    place = f"branch{int(branch) + 1}."
    if f"tower.pyramid.branches.{branch}.cls_token" not in own:
        return [(f"{place}convnext_model.{re.sub(r'[.]gamma$', '.weight', rest)}", value)]
    place = f"{place}clip_model."
    if rest == "cls_position":
        return []
    if rest == "cls_token":
        return [(f"{place}embeddings.class_embedding", value.flatten())]
    if rest == "pos_embed":
        table = torch.cat([own[f"tower.pyramid.branches.{branch}.cls_position"], value], 1)
        return [(f"{place}embeddings.position_embedding.weight", table[0])]
    rest = _renamed(rest, OF_CLIP)
    if ".attn.qkv." in rest:
        names = [rest.replace(".attn.qkv.", f".self_attn.{part}_proj.") for part in "qkv"]
        return [(f"{place}{own_name}", part) for own_name, part in zip(names, value.chunk(3))]
    return [(f"{place}{rest}", value)]


def _renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def read_folder(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a folder as transformers saves models, in one file or in several with an index.

    Raises:
        UserError: no such file, one that is damaged or holds other objects, or an index that names files elsewhere.
    """
    place = Path(folder).expanduser()
    if index := next((place / name for name in INDICES if (place / name).is_file()), None):
        names = _shards(index)
    else:
        names = [name for name in FILES if (place / name).is_file()][:1]
    if not names:
        raise UserError(f"{place}: found no weights, expected one of {', '.join((*FILES, *INDICES))}")
    found: dict[str, Tensor] = {}
    for name in names:
        found |= _read(place / name)
    return found


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: cannot be read ({error}); expected an object with weight_map") from error
    if wrong := next((name for name in names if not isinstance(name, str) or Path(name).name != name), None):
        raise UserError(f"{index}: names the file '{wrong}', expected files of its own folder")
    return names


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file, though the index names it") from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{file}: cannot be read as weights ({reason}); expected a complete file of tensors") from error
