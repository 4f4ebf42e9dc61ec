"""Which implementation of a kernel runs: Triton on CUDA, the PyTorch reference elsewhere, or what the user says."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal

from torch import Tensor
from torch.compiler import assume_constant_result

Backend = Literal["auto", "reference", "triton"]
_forced: ContextVar[Backend | None] = ContextVar("penstock_kernels", default=None)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Forces every kernel inside the block onto one implementation; wins over the variable `PENSTOCK_KERNELS`.

    Args:
        name: `reference` (PyTorch), `triton` (also on CPU tensors under `TRITON_INTERPRET=1`) or `auto`.

    Raises:
        ValueError: for any other name.
    """
    token = _forced.set(_checked(name))
    try:
        yield
    finally:
        _forced.reset(token)


def use_triton(x: Tensor) -> bool:
    """Whether a kernel called on `x` runs in Triton: on CUDA where Triton is installed, unless an override says else.

    `torch.compile` asks once, while it traces.

    Raises:
        ValueError: `PENSTOCK_KERNELS` holds another word than auto, reference or triton.
        RuntimeError: `triton` is asked for but is not installed.
    """
    return _use_triton(x.is_cuda)


@assume_constant_result
def _use_triton(cuda: bool) -> bool:
    name = _forced.get() or _checked(os.environ.get("PENSTOCK_KERNELS", "auto"))
    if name == "auto":
        return cuda and find_spec("triton") is not None
    if name == "triton" and find_spec("triton") is None:
        raise RuntimeError("kernels: backend 'triton' was asked for but triton is not installed")
    return name == "triton"


def jit(kernel: Callable, do_not_specialize: tuple[str, ...] = (), calls: tuple[Callable, ...] = ()) -> Callable:
    """`triton.jit` at the first launch, so that importing a kernel's file never imports Triton.

    The kernel's file imports `triton.language as tl` under `TYPE_CHECKING` only, with postponed annotations; the name
    becomes real here, and so do the functions of the same file that the kernel calls.
    """
    import triton

    names = kernel.__globals__
    names["tl"] = triton.language
    for function in calls:
        if names[function.__name__] is function and not hasattr(function, "fn"):
            names[function.__name__] = triton.jit(function)
    return triton.jit(kernel, do_not_specialize=do_not_specialize)


def _checked(name: str) -> Backend:
    if name not in ("auto", "reference", "triton"):
        raise ValueError(f"kernels: backend '{name}', expected one of auto, reference, triton")
    return name
