"""Transformers of diffusers to train TwinFlow from, and its releases (arXiv 2512.05150), by folder or hub name.

Read: a pipeline's folder (`transformer/` in it), a transformer's own folder, a training checkpoint `global_step_N` with
`model/` and `ema/`, all as `config.json` and safetensors in one file or in shards with an index; other weights for one
of these as safetensors or as OpenUni's `.pth`; adapters of PEFT. diffusers (the extra `text2image`) is imported where
it is used. Names of weights: `weights.twinflow_keys`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets import any_step_hosts as hosts
from penstock.lightning_modules.nets.any_step import AnyStep, HalfTime
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.weights import official
from penstock.lightning_modules.weights.twinflow_keys import Adapter, convert, fused, invert, openuni

FILE = "diffusion_pytorch_model"
PLACES = ("transformer", "", "ema")
HOSTS: dict[str, tuple[type[hosts.Host], str]] = {
    "SD3Transformer2DModel": (hosts.StableDiffusion3, "0.32"),
    "SanaTransformer2DModel": (hosts.Sana, "0.32"),
    "QwenImageTransformer2DModel": (hosts.QwenImage, "0.37"),
    "ZImageTransformer2DModel": (hosts.ZImage, "0.36"),
}


def pretrained(
    path: str,
    size: int | tuple[int, int] | None = None,
    text: TextEncoder | None = None,
    empty: str = "",
    target: Literal["embedding", "half", "none"] = "embedding",
    dtype: Literal["float32", "bfloat16"] = "float32",
    subfolder: str | None = None,
    weights: str | None = None,
    lora: str | None = None,
    adapter: Adapter = "default",
) -> nn.Module:
    """The transformer of a folder or hub repository as a velocity field, any-step unless told otherwise.

    Args:
        path: Folder or hub name.
        size: Height and width of the latents; None is what the transformer was trained at, if it says so.
        text: Encoder of prompts, for the features of the empty one; None: no prompt can be dropped or left out.
        empty: That prompt; TwinFlow's recipes say `Generate an image.`
        target: How it is told the target time: by a second embedding, taken from the weights if it is in them; by half
            the time left, as in low-rank recipes; or not at all (a flow of one time).
        dtype: Of the weights.
        subfolder: Of the transformer; None is `transformer`, none, or `ema`, the first that there is.
        weights: Safetensors, a folder of them, or an OpenUni `.pth`, whose weights replace those of `path`.
        lora: Folder of a PEFT adapter, which is added to the weights.
        adapter: Which one: what was trained, or its average.

    Raises:
        UserError: diffusers is absent or too old; no transformer at `path`, or one of no known kind; weights that are
            absent, unknown or of another shape; latents or features that don't fit.
    """
    folder = locate(path, subfolder)
    config = _json(folder / "config.json")
    kind = str(config.get("_class_name", "")).removesuffix("Wrapper")
    if kind not in HOSTS:
        near = did_you_mean(kind, HOSTS)
        raise UserError(f"{folder}: a transformer '{kind}'{near}, expected one of {', '.join(HOSTS)}")
    host = HOSTS[kind][0]
    state = read(folder if weights is None else Path(weights).expanduser())
    second = _second(state, host)
    state = {key: value for key, value in state.items() if key not in second}
    if lora is not None:
        state = fused(state, *_adapter(Path(lora).expanduser(), adapter), adapter)
    with _weightless():
        transformer = _class(kind).from_config(config)
    source = folder if weights is None else Path(weights)
    _check(state, transformer.state_dict(), source)
    precision = getattr(torch, dtype)
    transformer.load_state_dict({key: value.to(precision, copy=True) for key, value in state.items()}, assign=True)
    sides = (size, size) if isinstance(size, int) else size
    shape = None if sides is None else (host.latents(config)[0], *sides)
    try:
        net = host(transformer.train(), shape, None if text is None else text([empty])[0])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if target != "embedding":
        return net if target == "none" else HalfTime(net)
    net = AnyStep(net)
    if second:
        _check(second, _second(invert(net.state_dict(), host.embedding), host), source)
        net.load_state_dict(convert(second, host.embedding), strict=False)
    return net


def save(net: AnyStep, folder: str | Path) -> None:
    """Writes an any-step transformer as the official code does: `config.json` and safetensors in shards of 5 GB."""
    from huggingface_hub import save_torch_state_dict

    host = net.net
    host.transformer.save_config(folder)
    state = invert(net.state_dict(), host.embedding)
    save_torch_state_dict(state, folder, filename_pattern=FILE + "{suffix}.safetensors")


def locate(path: str, subfolder: str | None = None) -> Path:
    """The folder of the transformer in the folder or hub repository `path`.

    Raises:
        UserError: no such folder, none that can be fetched, or no transformer in it.
    """
    folder, places = Path(path).expanduser(), PLACES if subfolder is None else (subfolder,)
    if not folder.is_dir():
        folder = _fetched(path, places)
    found = next((folder / place for place in places if (folder / place / "config.json").is_file()), None)
    if found is None:
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        wanted = f"{subfolder}/" if subfolder else "transformer/ or ema/, or a config.json"
        raise UserError(f"{folder}: no transformer in it; found {inside}, expected {wanted}")
    return found


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a safetensors file, of a folder with one or with shards and their index, or of an OpenUni `.pth`.

    Raises:
        UserError: a file is absent, cut short or of another kind.
    """
    if path.suffix in (".pth", ".pt"):
        state = official.read(path, "OpenUni's weights")
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds a {type(state).__name__}, expected OpenUni's weights by name")
        return openuni(state.get("state_dict", state))[0]
    if not path.is_dir():
        return _safetensors(path)
    index = path / f"{FILE}.safetensors.index.json"
    if not index.is_file():
        return _safetensors(path / f"{FILE}.safetensors")
    places = _json(index).get("weight_map", {})
    outside = next((name for name in places.values() if Path(name).name != name), None)
    if outside is not None:
        raise UserError(f"{index}: shard '{outside}', expected the name of a file in this folder")
    found = {name: _safetensors(path / name) for name in sorted(set(places.values()))}
    lost = next((key for key, name in places.items() if key not in found[name]), None)
    if lost is not None:
        raise UserError(f"{path / places[lost]}: no weight '{lost}', expected as {index.name} says")
    return {key: value for state in found.values() for key, value in state.items()}


def _class(kind: str) -> Any:
    needed = HOSTS[kind][1]
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"{kind} needs diffusers, which is not installed: pip install 'penstock[text2image]'"
        ) from error
    if Version(diffusers.__version__) < Version(needed):
        raise UserError(
            f"{kind} needs diffusers {needed} or later, found {diffusers.__version__}: pip install -U diffusers"
        )
    return getattr(diffusers, kind)


def _fetched(path: str, places: tuple[str, ...]) -> Path:
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{path}: no such folder; expected a folder or a hub name like owner/model")
    try:
        from huggingface_hub import snapshot_download

        patterns = [f"{place}/{end}".lstrip("/") for place in places for end in ("*.json", "*.safetensors")]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        raise UserError(f"{path}: is no local folder and cannot be fetched from the hub ({reason})") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected weights as safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read, probably cut short ({error})") from error


def _adapter(folder: Path, adapter: Adapter) -> tuple[dict[str, Tensor], float]:
    """Weights and scale of the adapter in `folder`: there, or, if it isn't `default`, in a folder of its name."""
    inner = folder / adapter if (folder / adapter / "adapter_config.json").is_file() else folder
    config = _json(inner / "adapter_config.json")
    for name in ("r", "lora_alpha"):
        if name not in config:
            raise UserError(f"{inner / 'adapter_config.json'}: no '{name}', expected r and lora_alpha")
    for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise UserError(f"{inner / 'adapter_config.json'}: {name}, expected a plain adapter of one rank")
    return _safetensors(inner / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]


def _second(state: dict[str, Tensor], host: type[hosts.Host]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith(f"{host.embedding}_2.")}


def _check(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    for key in sorted(own.keys() | state.keys()):
        if key not in own:
            raise UserError(f"{path}: unknown weight '{key}'{did_you_mean(key, own)}")
        expected = tuple(own[key].shape)
        if key not in state:
            raise UserError(f"{path}: no weight '{key}', expected one of shape {expected}")
        if state[key].shape != own[key].shape:
            raise UserError(f"{path}: weight '{key}' has shape {tuple(state[key].shape)}, expected {expected}")


@contextmanager
def _weightless() -> Iterator[None]:
    """Inside, modules are made with the shapes of their parameters only; buffers are what they are."""
    register = nn.Module.register_parameter

    def shapes_only(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = shapes_only
    try:
        yield
    finally:
        nn.Module.register_parameter = register
