"""Low-rank adaptation (arXiv 2106.09685) of linear layers and convolutions, under the names of BOSS (arXiv 2312.16414).

An adapted layer has `parametrizations.weight.original`, `parametrizations.weight.0.lora_A` and `...0.lora_B` in its
state dict, the names that `torch.nn.utils.parametrize` gives. PEFT wraps the layer instead (`base_layer.weight`,
`lora_A.default.weight`) and keeps the A of a convolution as a kernel, so that its files have another layout.

A layer adds the low-rank part's output to its own, as PEFT does, instead of using the sum of both weights: in bfloat16
a small change would be lost in the rounding of that sum.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from penstock.lightning_modules.nets.ncsnpp import AttentionBlock

ORIGINAL, A, B = (f".parametrizations.weight.{part}" for part in ("original", "0.lora_A", "0.lora_B"))


class LowRank(nn.Module):
    """`W + (alpha / r) (B A)` in the shape of `W`; a convolution's weight counts as `(out, in * kh * kw)`.

    A is drawn uniformly as the weight of a linear layer is, B is zero: the layer begins as it was, to the bit. Both are
    float32 at least.

    Args:
        weight: `W` `(out, ...)`.
        rank: r, at least 1.
        alpha: strength.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float = 1.0):
        super().__init__()
        self.scale = alpha / rank
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight[0].numel(), dtype=dtype))
        self.lora_B = nn.Parameter(weight.new_zeros(len(weight), rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, shape of `weight`."""
        return (weight + self.scale * (self.lora_B @ self.lora_A).view_as(weight)).to(weight.dtype)

    def output(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        """What the low-rank part adds to the output of `layer`, without forming its matrix."""
        x = x.to(self.lora_A.dtype)
        if isinstance(layer, nn.Linear):
            return self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)
        kernel = self.lora_A.view(-1, layer.in_channels, *layer.kernel_size)
        return self.scale * F.conv2d(layer._conv_forward(x, kernel, None), self.lora_B[:, :, None, None])


def adapt(
    net: nn.Module, rank: int = 4, alpha: float = 1.0, skip: tuple[type[nn.Module], ...] = (AttentionBlock,)
) -> None:
    """Gives every `nn.Linear` and `nn.Conv2d` of `net` a low-rank part and freezes everything else, in place.

    Frozen layers and convolutions in groups stay as they are. Call it before the optimiser and the average of the
    weights are made. The projections in NCSN++'s attention blocks
    are no linear layers in the official network, which leaves them as they are; hence `skip`.

    Args:
        net: network.
        rank: of the added matrices, at least 1.
        alpha: strength; the added matrix is scaled by `alpha / rank`.
        skip: modules that stay as they are, with all in them.

    Raises:
        ValueError: a rank below 1, or nothing to adapt.
    """
    if rank < 1:
        raise ValueError(f"LoRA: rank {rank}, expected 1 or more")
    layers = [layer for layer in _layers(net, skip) if layer.weight.requires_grad]
    net.requires_grad_(False)
    if not layers:
        raise ValueError(f"LoRA: {type(net).__name__} has no linear layer or convolution to adapt")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))
        layer.forward = partial(_adapted, layer)


def merge(net: nn.Module) -> None:
    """Adds the low-rank parts to the weights, in place: `net` has its plain names again, and all its outputs."""
    for layer in net.modules():
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], LowRank):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            del layer.forward


def base_state(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain state dict under the names of the adapted `net`, whose low-rank parts stay as they are."""
    low_rank = {key: value for key, value in net.state_dict().items() if key.endswith((A, B))}
    adapted = {key.removesuffix(B) + ".weight" for key in low_rank if key.endswith(B)}
    renamed = {key.removesuffix(".weight") + ORIGINAL if key in adapted else key: value for key, value in state.items()}
    return {**renamed, **low_rank}


def _adapted(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    weight, low_rank = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    run = F.linear if isinstance(layer, nn.Linear) else layer._conv_forward
    own = run(x, weight, layer.bias)
    return own + low_rank.output(layer, x).to(own.dtype)


def _layers(module: nn.Module, skip: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    if isinstance(module, skip):
        return
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        yield module
    for child in module.children():
        yield from _layers(child, skip)
