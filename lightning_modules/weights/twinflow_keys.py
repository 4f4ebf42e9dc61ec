"""Names of weights in TwinFlow's releases (arXiv 2512.05150, `inclusionAI/TwinFlow`) and in our networks, both ways.

A release has the names of the diffusers transformer, and beside its time embedding, say `time_text_embed.*`, the second
one as `time_text_embed_2.*`. Ours is an `AnyStep` of a host of `nets.any_step_hosts`, which has them as
`net.transformer.time_text_embed.first.*` and `...second.*`, and all else under `net.transformer.`.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from penstock.lightning_modules.errors import UserError

Adapter = Literal["default", "old"]
INNER = "net.transformer."
OPENUNI = ("transformer.", "connector.", "projector.", "meta_queries")


def convert(state: Mapping[str, Tensor], embedding: str) -> dict[str, Tensor]:
    """Our state dict from a released one, whose time embedding is called `embedding` (`Host.embedding`)."""
    places = {f"{embedding}_2.": f"{embedding}.second.", f"{embedding}.": f"{embedding}.first."}
    return {INNER + _renamed(key, places): value for key, value in state.items()}


def invert(state: Mapping[str, Tensor], embedding: str) -> dict[str, Tensor]:
    """The released state dict from ours.

    Raises:
        UserError: a key isn't that of an `AnyStep` of a host.
    """
    places = {f"{embedding}.second.": f"{embedding}_2.", f"{embedding}.first.": f"{embedding}."}
    strange = next((key for key in state if not key.startswith(INNER)), None)
    if strange is not None:
        raise UserError(f"weight '{strange}': expected {INNER}*, that of an any-step transformer")
    return {_renamed(key.removeprefix(INNER), places): value for key, value in state.items()}


def openuni(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's state dict, and that of what makes its condition, from an OpenUni `.pth`.

    There the transformer has the prefix `transformer.`, beside `connector.*`, `projector.*` and `meta_queries`; where
    the official training code has read it, all but `meta_queries` have one `transformer.` more.

    Raises:
        UserError: another key.
    """
    deep = any(key.startswith("transformer.transformer.") for key in state)
    plain = {key.removeprefix("transformer.") if deep else key: value for key, value in state.items()}
    strange = next((key for key in plain if not key.startswith(OPENUNI)), None)
    if strange is not None:
        raise UserError(f"weight '{strange}': expected {', '.join(f'{name}*' for name in OPENUNI)}, as in OpenUni")
    inner = {k.removeprefix("transformer."): v for k, v in plain.items() if k.startswith("transformer.")}
    return inner, {key: value for key, value in plain.items() if not key.startswith("transformer.")}


def fused(
    state: Mapping[str, Tensor], low_rank: Mapping[str, Tensor], scale: float = 1.0, adapter: Adapter = "default"
) -> dict[str, Tensor]:
    """The transformer's state dict with `scale (B A)` added to each weight that `low_rank` adapts.

    PEFT's names: `<layer>.lora_A.weight` and `<layer>.lora_B.weight` in an adapter's file, `<layer>.lora_A.old.weight`
    where several adapters are in one, both behind `base_model.model.` and `transformer.`. In TwinFlow's low-rank runs
    `default` is the one that is trained, `old` its average.

    Args:
        state: of the transformer, under its own names.
        low_rank: of the adapters; others than `adapter` are left out.
        scale: `lora_alpha / r`.
        adapter: which of them.

    Raises:
        UserError: an unknown key, half a pair, a layer that the transformer doesn't have, or has in another shape.
    """
    pairs = _pairs(low_rank, adapter)
    out = dict(state)
    for layer, pair in pairs.items():
        if len(pair) < 2:
            raise UserError(f"adapter '{adapter}': layer '{layer}' has {next(iter(pair))} only, expected A and B")
        weight = out.get(f"{layer}.weight")
        if weight is None:
            raise UserError(f"adapter '{adapter}': layer '{layer}' isn't in the transformer")
        a, b = pair["A"].float().flatten(1), pair["B"].float().flatten(1)
        if (len(b), a.shape[1]) != tuple(weight.flatten(1).shape):
            found = f"{tuple(pair['B'].shape)} times {tuple(pair['A'].shape)}"
            raise UserError(f"adapter '{adapter}': layer '{layer}' is {found}, expected {tuple(weight.shape)}")
        out[f"{layer}.weight"] = (weight.float() + scale * (b @ a).view_as(weight)).to(weight.dtype)
    return out


def _pairs(low_rank: Mapping[str, Tensor], adapter: str) -> dict[str, dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in low_rank.items():
        name = key.removeprefix("base_model.model.").removeprefix("transformer.")
        layer, found, rest = name.partition(".lora_")
        half, _, which = rest.removesuffix(".weight").removesuffix("weight").partition(".")
        if not found or half not in ("A", "B") or not rest.endswith("weight"):
            raise UserError(f"adapter '{adapter}': key '{key}', expected <layer>.lora_A.* and <layer>.lora_B.*")
        if which in ("", adapter):
            pairs.setdefault(layer, {})[half] = value
    if not pairs:
        raise UserError(f"adapter '{adapter}': no weights of it, expected <layer>.lora_A.{adapter}.weight")
    return pairs


def _renamed(key: str, places: Mapping[str, str]) -> str:
    for old, new in places.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
