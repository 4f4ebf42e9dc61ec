"""Networks of one time made any-step: a second embedding tells how far a step reaches (t = 0 noise, t = 1 data)."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

from torch import Tensor, nn

Start = Literal["copy", "normal"]


class SecondTime(nn.Module):
    """`E1(t) + (r - t) E2(r)` in the place of a network's time embedding `E1(t)` (arXiv 2512.05150, official code).

    At r = t, and where no r is given, that is E1(t), to the bit. Anything else that the embedding takes goes to both,
    and if it has several outputs, each of them is added to. What stands for `r` and `r - t` is the caller's choice.

    Args:
        first: `E1`, the network's own.
        start: `E2` begins as a copy of `E1`, or with normal weights of deviation 0.02 and zero biases.
    """

    def __init__(self, first: nn.Module, start: Start = "copy"):
        super().__init__()
        self.first, self.second = first, deepcopy(first)
        self._until: tuple[Tensor, Tensor] | None = None
        if start == "normal":
            for layer in self.second.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    @contextmanager
    def until(self, r: Tensor | None, gap: Tensor | None) -> Iterator[None]:
        """Inside, `E2` is asked at `r` `(B,)`, in the embedding's own clock, and weighs `gap` `(B,)`; None: no `E2`."""
        self._until = None if r is None else (r, gap)
        try:
            yield
        finally:
            self._until = None

    def forward(self, t: Tensor, *more: Any, **named: Any) -> Any:
        own = self.first(t, *more, **named)
        if self._until is None:
            return own
        r, gap = self._until
        other = self.second(r, *more, **named)
        if isinstance(own, tuple):
            return tuple(_add(a, b, gap) for a, b in zip(own, other))
        return _add(own, other, gap)


def _add(own: Tensor, other: Tensor, gap: Tensor) -> Tensor:
    return own + gap.to(own.dtype).reshape(-1, *[1] * (own.ndim - 1)) * other


class AnyStep(nn.Module):
    """Gives `net(x, t, cond)` a target time: `net(x, t, cond, r)` is the average velocity from t to r.

    Without r, or at r = t, it is the network as it was. Times up to 2 are those of a twin that shares the weights.

    Args:
        net: with a time embedding, a module of `(B,)` times, at `time`. If it has a clock of its own, its
            `second_time(t, r)` gives what the second embedding is asked at and how much it weighs. A net that does not
            know t = 0 says so by `no_start`, the option that changes it.
        time: name of that module; None is what the network says (`time_module`), or `time`.
        start: see `SecondTime`; None is what the network says (`time_start`), or `copy`.

    Attributes:
        twin: whether times in (1, 2] differ from those in [0, 1), as training with a twin needs.

    Raises:
        ValueError: the network has no module of that name, or does not know t = 0.
    """

    def __init__(self, net: nn.Module, time: str | None = None, start: Start | None = None):
        super().__init__()
        time, start = time or getattr(net, "time_module", "time"), start or getattr(net, "time_start", "copy")
        embedding = dict(net.named_modules()).get(time)
        if embedding is None:
            raise ValueError(f"AnyStep: {type(net).__name__} has no module '{time}', expected its time embedding")
        if getattr(net, "no_start", ""):
            raise ValueError(f"AnyStep: {type(net).__name__} does not know t = 0, expected {net.no_start}")
        self.net, self.place = net, time
        net.set_submodule(time, SecondTime(embedding, start))
        self.shape, self.num_classes, self.twin = net.shape, net.num_classes, getattr(net, "twin", True)
        self.checkpoint_blocks = getattr(net, "checkpoint_blocks", ())

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` with the null condition where `mask` `(B,)` is true."""
        return self.net.drop_condition(cond, mask)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Average velocity `(B, ...)` of states `x` `(B, ...)` from `t` `(B,)` to `r` `(B,)`; None is r = t."""
        with self.net.get_submodule(self.place).until(*self._second(t, r)):
            return self.net(x, t, cond)

    def _second(self, t: Tensor, r: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if r is None:
            return None, None
        return self.net.second_time(t, r) if hasattr(self.net, "second_time") else (r, r - t)

    def adopt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a network of one time under the names here; both embeddings begin as its own."""
        place, found = self.place + ".", {}
        for key, value in state.items():
            if key.startswith(place):
                rest = key.removeprefix(place)
                found |= {f"net.{place}{which}.{rest}": value for which in ("first", "second")}
            else:
                found[f"net.{key}"] = value
        return found


class HalfTime(nn.Module):
    """A network of one time that reads both in one number, `(1 + t + (t - r)) / 2` (TwinFlow's low-rank recipes).

    No second embedding, so nothing new to learn, but t = 0.5 with r = 1 and t = 0 with r = 0 look the same, and at
    r = t the network is asked nearer to the data than it was trained (arXiv 2512.05150, official code: `t - r / 2` in
    its time; whether that is intended is an open question there).

    Args:
        net: `net(x, t, cond)`.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.shape, self.num_classes, self.twin = net, net.shape, net.num_classes, getattr(net, "twin", True)
        self.checkpoint_blocks = getattr(net, "checkpoint_blocks", ())

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` with the null condition where `mask` `(B,)` is true."""
        return self.net.drop_condition(cond, mask)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Average velocity `(B, ...)` of states `x` `(B, ...)` from `t` `(B,)` to `r` `(B,)`; None is r = t."""
        return self.net(x, 0.5 + t - 0.5 * (t if r is None else r), cond)
