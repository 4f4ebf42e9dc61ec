"""Official LoRA checkpoints of BOSS (arXiv 2312.16414, `nguyenngocbaocmt02/BOSS`) for an NCSN++ with `nets.lora`.

The layers have the names of Rectified Flow; adapted ones `<layer>.parametrizations.weight.original`, `...0.lora_A`,
`...0.lora_B` and a mask of ones `...0.lora_dropout_mask`, which ours has no need of.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from penstock.lightning_modules.nets.lora import ORIGINAL, A, B
from penstock.lightning_modules.weights import rectified_flow

MASK = ".parametrizations.weight.0.lora_dropout_mask"


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from an official one, with or without the prefix `module.`.

    Raises:
        UserError: a key is not of the official layout.
    """
    plain = {key.removeprefix("module."): value for key, value in state.items() if not key.endswith(MASK)}
    return _renamed(plain, rectified_flow.convert)


def invert(state: Mapping[str, Tensor], num_scales: int = 1000, sigma_max: float = 50.0) -> dict[str, Tensor]:
    """The official state dict from ours; `num_scales` and `sigma_max` as in `weights.rectified_flow.invert`."""

    def official(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return rectified_flow.invert(base, num_scales, sigma_max)

    out = _renamed(state, official)
    masks = {k.removesuffix(A) + MASK: torch.ones_like(v[:1]) for k, v in out.items() if k.endswith(A)}
    return {**out, **masks}


def _renamed(
    state: Mapping[str, Tensor], rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Renames the base layers and lets the low-rank parts follow."""
    low_rank = {key: value for key, value in state.items() if key.endswith((A, B))}
    adapted = {key.removesuffix(A) for key in low_rank if key.endswith(A)}
    base = {key.replace(ORIGINAL, ".weight"): value for key, value in state.items() if key not in low_rank}
    out = {}
    new = rename(base)
    theirs = dict(zip((key for key in base if key != "sigmas"), (key for key in new if key != "sigmas")))
    stems = {stem: theirs[f"{stem}.weight"].removesuffix(".weight") for stem in adapted}
    for key, value in new.items():
        stem = key.removesuffix(".weight")
        out[stem + ORIGINAL if key.endswith(".weight") and stem in stems.values() else key] = value
    for key, value in low_rank.items():
        part = A if key.endswith(A) else B
        out[stems[key.removesuffix(part)] + part] = value
    return out
