"""Networks of a module that train, and the blocks that they name: what is sharded, and recomputed, as one."""

from collections.abc import Iterator

from torch import nn


def networks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts of `module` that can be called and have weights to train."""
    for child in module.children():
        if not any(p.requires_grad for p in child.parameters()):
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from networks(child)
        else:
            yield child


def blocks(net: nn.Module) -> list[nn.Module]:
    """The parts of `net`, inner before outer, that it or a network inside it names in `checkpoint_blocks`."""
    kinds = tuple({kind for part in net.modules() for kind in getattr(part, "checkpoint_blocks", ())})
    return [part for part in net.modules() if part is not net and isinstance(part, kinds)][::-1] if kinds else []
