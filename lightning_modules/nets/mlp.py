"""Multi-layer perceptrons for points."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.nets.condition import Condition, FourierEmbedding, check_input

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


class MLP(nn.Module):
    """Velocity field on [x, time features, class]: `depth` linear layers with an activation between them.

    The defaults are the network of the 2-D toys of arXiv 2209.03003 (its widths are unconfirmed): x and the plain t,
    width 100, three linear layers, tanh. Harder point sets: `MLP(width=512, depth=5, activation="silu", fourier=32)`.

    Args:
        shape: (D,) of a point.
        width: of the hidden layers.
        depth: number of linear layers, at least 2.
        activation: between the layers.
        fourier: number of random Fourier frequencies of t; 0 = t itself.
        num_classes: 0 = unconditional. A class adds a learned vector to the first layer; so does the null class.
    """

    def __init__(
        self,
        shape: tuple[int] = (2,),
        width: int = 100,
        depth: int = 3,
        activation: Literal["tanh", "silu", "gelu", "relu"] = "tanh",
        fourier: int = 0,
        num_classes: int = 0,
    ):
        super().__init__()
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"shape must be (dimensions,), got {tuple(shape)}")
        if depth < 2:
            raise ValueError(f"depth must be at least 2, got {depth}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.shape, self.num_classes = tuple(shape), num_classes
        self.time = FourierEmbedding(fourier, scale=1.0) if fourier else None
        self.condition = Condition(width, num_classes)
        inputs = shape[0] + (2 * fourier or 1)
        self.stem = nn.Linear(inputs, width)
        hidden = [layer for _ in range(depth - 2) for layer in (ACTIVATIONS[activation](), nn.Linear(width, width))]
        self.body = nn.Sequential(*hidden, ACTIVATIONS[activation](), nn.Linear(width, shape[0]))

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` `(B,)` with the null class where `mask` `(B,)` is true."""
        return self.condition.drop(cond, mask)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity `(B, D)` at x `(B, D)`, t `(B,)` in [0, 1] (0 = noise), cond `(B,)` classes or None."""
        check_input(x, t, self.shape)
        features = t[:, None] if self.time is None else self.time(t)
        h = self.stem(torch.cat([x, features.to(x.dtype)], dim=1))
        pooled, _ = self.condition(cond, len(x))
        return self.body(h if pooled is None else h + pooled)
