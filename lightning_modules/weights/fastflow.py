"""Weights of public FastFlow code (gathierry/FastFlow, anomalib, FrEIA) under our names."""

import re
from collections.abc import Mapping

from torch import Tensor

from penstock.lightning_modules.errors import UserError

STEP = re.compile(
    r"(?:model\.)?(?:nf_flows|fast_flow_blocks)\.(\d+)\.module_list\.(\d+)\."
    r"(global_scale|global_offset|w_perm|w_perm_inv|subnet\.(\d)\.(weight|bias))"
)
OTHER = re.compile(r"(?:model\.)?(?:norms\.(\d+\.(?:weight|bias))|feature_extractor\.(.+))")
SECOND = {"2": 2, "4": 2, "0": 0, "1": 0}  # with explicit padding layers the convolutions are 1 and 4, else 0 and 2


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of `nets.fastflow.FastFlowNet` that public code calls otherwise.

    A permutation may be an index, or a one-hot matrix `(C, C, 1, 1)`. Which form of the clamp the weights were trained
    with is not in them: `tanh` for gathierry's and anomalib's files, `tanh_over_clamp` for those trained with a FrEIA
    after August 2023.

    Args:
        state: gathierry's `model_state_dict`, or the `state_dict` of anomalib's checkpoint.

    Raises:
        UserError: an entry that is none of theirs, or no flow at all.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if step := STEP.fullmatch(key):
            flow, number, kind, conv, part = step.groups()
            if kind == "w_perm_inv":
                continue
            name, value = _of_step(kind, value, conv, part)
            found[f"flows.{flow}.steps.{number}.{name}"] = value
        elif other := OTHER.fullmatch(key):
            norm, extractor = other.groups()
            found[f"norms.{norm}" if norm else f"backbone.net.{extractor}"] = value
        elif not key.startswith(("post_processor.", "pre_processor.", "image_metrics.", "pixel_metrics.")):
            raise UserError(f"weights: found '{key}', expected nf_flows.*, fast_flow_blocks.*, norms.* or a backbone's")
    if not any(key.startswith("flows.") for key in found):
        raise UserError("weights: no flow in them; expected nf_flows.* or fast_flow_blocks.*")
    return found


def _of_step(kind: str, value: Tensor, conv: str | None, part: str | None) -> tuple[str, Tensor]:
    if conv is not None:
        return f"subnet.{SECOND[conv]}.{part}", value
    if kind == "w_perm":
        return "perm", value[:, :, 0, 0].argmax(1) if value.ndim == 4 else value.long()
    return kind, value.flatten()
