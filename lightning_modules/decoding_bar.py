"""A bar for samples that are made token by token or chunk by chunk: tokens a second, sweeps of the last chunk."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def decoding_bar(model: Any, n: int, frames: int | None = None) -> Iterator[None]:
    """Shows how far `model.sample` is while the block runs; for a model that is decoded so, else nothing.

    It appears when decoding begins: what is refused before is all that is seen.

    Args:
        model: Any generative module; an `AutoregressiveModule` tells its progress.
        n: Samples, in all calls of `sample` together.
        frames: Of a clip; None is the network's.
    """
    if not hasattr(model, "told"):
        yield
        return
    bar: tqdm | None = None

    def told(tokens: int, sweeps: int) -> None:
        nonlocal bar
        if bar is None:
            bar = _bar(n * model.net.tokens_of_a_sample(frames))
        if tokens:
            bar.set_postfix(sweeps=sweeps, refresh=False)
            bar.update(tokens)

    model.told = told
    try:
        yield
        if bar is not None:
            bar.total = bar.n
    finally:
        model.told = None
        if bar is not None:
            bar.close()


def _bar(total: int) -> tqdm:
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc="sample",
        unit="token",
        unit_scale=True,
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        mininterval=0.2 if terminal else 15.0,
        maxinterval=10.0 if terminal else 15.0,
        file=sys.stderr,
    )
