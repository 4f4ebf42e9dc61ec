"""Recorded numbers of official code: small files in tests/golden, others beside the checkout where it has them."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

OWN = Path(__file__).parent / "golden"
BESIDE = Path(__file__).parents[2] / "shared" / "golden"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def golden(system: str, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Entries of the file `<name>_*` of a system: (weights, in, out), each by the rest of its key; skips without it."""
    found = [path for folder in (OWN, BESIDE) for path in (folder / system).glob(f"{name}_*.safetensors")]
    if not found:
        pytest.skip(f"recorded numbers {system}/{name}: neither in tests/golden nor in shared/golden")
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "in": {}, "out": {}}
    for key, value in load_file(found[0]).items():
        part, _, rest = key.partition("/")
        parts[part][rest] = value
    return parts["weights"], parts["in"], parts["out"]


class Record:
    """A file of recorded numbers: `record[key]` is an input, `record.left` what is to be compared yet.

    The error is the largest difference over 1 + the largest entry.

    Args:
        system: Folder.
        name: Number of the file.
        keys: Pattern of the results to compare, from their beginning.
        dtype: Of inputs and weights; decides the tolerance.
    """

    def __init__(self, system: str, name: str, keys: str = "", dtype: torch.dtype = torch.float64):
        self.dtype, (self.weights, self.given, self.out) = dtype, golden(system, name)
        self.left = {key for key in self.out if re.match(keys, key)}
        assert self.left, f"nothing in {system}/{name} begins like {keys}"

    def __getitem__(self, key: str) -> Tensor:
        value = self.given[key]
        return value.to(self.dtype) if value.is_floating_point() else value

    def load(self, net: nn.Module, prefix: str = "", unused: str = "$^") -> nn.Module:
        """Gives a network the weights under a prefix, but those of a pattern."""
        weights = {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}
        net.load_state_dict({k: v for k, v in weights.items() if not re.search(unused, k)})
        return net.to(self.dtype)

    def error(self, found: Tensor, key: str) -> float:
        """Of an outcome whose axes may be grouped otherwise."""
        expected = self.out[key].double()
        difference = found.detach().reshape(expected.shape).double() - expected
        return float(difference.abs().max() / (1 + expected.abs().max()))

    def same(self, found: Tensor, key: str) -> None:
        """Compares an outcome."""
        error = self.error(found, key)
        assert error <= TOLERANCE[self.dtype], f"{key}: {error:.1e}"
        self.left.discard(key)
