"""Batch norms of a frozen network inside of its convolutions: the same function with fewer passes over memory."""

import copy
from collections.abc import Callable
from typing import Any

from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


def folded(net: nn.Module, run: Callable[[], Any]) -> nn.Module:
    """A copy of a network in evaluation mode in which convolutions do the work of the norms that follow them.

    Args:
        net: Network; it is not changed.
        run: Runs it once, which shows the norms that see what a convolution gave.
    """
    names = {module: name for name, module in net.named_modules()}
    made: dict[int, tuple[Tensor, nn.Module]] = {}
    pairs: dict[str, str] = {}
    calls: list[str] = []

    def after(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        calls.append(names[module])
        made[id(result)] = result, module

    def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls.append(names[module])
        if id(given[0]) in made:
            pairs[names[module]] = names[made[id(given[0])][1]]

    hooks = [m.register_forward_hook(after) for m in names if type(m) in CONVOLUTIONS]
    hooks += [m.register_forward_pre_hook(before) for m in names if type(m) in NORMS]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    result = copy.deepcopy(net)
    for norm, convolution in pairs.items():
        if calls.count(norm) == calls.count(convolution) == 1:
            _merge(result, convolution, norm)
    return result


def _merge(net: nn.Module, convolution: str, norm: str) -> None:
    """A norm becomes what it does after the affine map: nothing, or its activation."""
    old, bn = net.get_submodule(convolution), net.get_submodule(norm)
    if bn.running_mean is None or old.weight.dtype.itemsize < 4:
        return
    net.set_submodule(convolution, fuse_conv_bn_eval(old, bn))
    net.set_submodule(norm, nn.Sequential(bn.drop, bn.act) if isinstance(bn, BatchNormAct2d) else nn.Identity())
