"""Low-rank adaptation (arXiv 2106.09685) of linear layers and convolutions, under the names of BOSS (arXiv 2312.16414).

An adapted layer has `parametrizations.weight.original`, `parametrizations.weight.0.lora_A` and `...0.lora_B` in its
state dict, the names that `torch.nn.utils.parametrize` gives. PEFT wraps the layer instead (`base_layer.weight`,
`lora_A.default.weight`) and keeps the A of a convolution as a kernel, so that its files have another layout.
"""

import math
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from penstock.lightning_modules.nets.ncsnpp import AttentionBlock

ORIGINAL, A, B = (f".parametrizations.weight.{part}" for part in ("original", "0.lora_A", "0.lora_B"))


class LowRank(nn.Module):
    """`W + (alpha / r) (B A)` in the shape of `W`; a convolution's weight counts as `(out, in * kh * kw)`.

    A is drawn uniformly as the weight of a linear layer is, B is zero: the layer begins as it was, to the bit.

    Args:
        weight: `W` `(out, ...)`.
        rank: r, at least 1.
        alpha: strength.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float = 1.0):
        super().__init__()
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight[0].numel()))
        self.lora_B = nn.Parameter(weight.new_zeros(len(weight), rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, shape of `weight`."""
        return weight + self.scale * (self.lora_B @ self.lora_A).view_as(weight)


def adapt(
    net: nn.Module, rank: int = 4, alpha: float = 1.0, skip: tuple[type[nn.Module], ...] = (AttentionBlock,)
) -> None:
    """Gives every `nn.Linear` and `nn.Conv2d` of `net` a low-rank part and freezes everything else, in place.

    Call it before the optimiser and the average of the weights are made. The projections in NCSN++'s attention blocks
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
    net.requires_grad_(False)
    layers = [*_layers(net, skip)]
    if not layers:
        raise ValueError(f"LoRA: {type(net).__name__} has no linear layer or convolution to adapt")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))


def merge(net: nn.Module) -> None:
    """Adds the low-rank parts to the weights, in place: `net` has its plain names again, and all its outputs."""
    for layer in net.modules():
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], LowRank):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def base_state(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain state dict under the names of the adapted `net`, whose low-rank parts stay as they are."""
    low_rank = {key: value for key, value in net.state_dict().items() if key.endswith((A, B))}
    adapted = {key.removesuffix(B) + ".weight" for key in low_rank if key.endswith(B)}
    renamed = {key.removesuffix(".weight") + ORIGINAL if key in adapted else key: value for key, value in state.items()}
    return {**renamed, **low_rank}


def _layers(module: nn.Module, skip: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    if isinstance(module, skip):
        return
    if isinstance(module, nn.Linear | nn.Conv2d):
        yield module
    for child in module.children():
        yield from _layers(child, skip)
