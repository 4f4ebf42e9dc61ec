"""Time embeddings, conditions with a null value, and the small layers that several networks share.

Every network is called `net(x, t, cond=None)` with `t` in [0, 1], t = 0 noise and t = 1 data.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def working_dtype(t: Tensor) -> torch.dtype:
    """The dtype embeddings are computed in: float64 for float64 times, otherwise float32 (also for half types)."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def positional_embedding(t: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """Sinusoidal embedding of arXiv 1706.03762 section 3.5 in the variant of score-based models.

    Frequency i of `dim // 2` is exp(-i ln(10000) / (dim // 2 - 1)); the sines come before the cosines.

    Args:
        t: `(B,)` real-valued times.
        dim: even size of the embedding, at least 4.
        scale: factor on the times; the frequencies suit scale * t in [0, 1000].

    Returns:
        `(B, dim)` in float32, or in float64 for float64 times.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"a positional embedding needs an even size of at least 4, got {dim}")
    half = dim // 2
    dtype = working_dtype(t)
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=dtype) * (-math.log(10000) / (half - 1)))
    angles = scale * t.to(dtype)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Sequential):
    """Two linear layers on the sinusoidal embedding of 1000 t: times `(B,)` to `(B, dim)`.

    Args:
        features: even size of the sinusoidal embedding.
        dim: size of the result.
    """

    def __init__(self, features: int, dim: int):
        super().__init__(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.features = features

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(positional_embedding(t, self.features, 1000).to(self[0].weight.dtype))


class FourierEmbedding(nn.Module):
    """Random Fourier features: [sin(2 pi W s), cos(2 pi W s)] with W ~ N(0, scale^2) frozen (arXiv 2006.10739 eq. 5).

    Args:
        frequencies: number of random frequencies; the embedding is twice as long.
        scale: standard deviation of the frequencies.
    """

    def __init__(self, frequencies: int, scale: float = 16.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(frequencies) * scale, requires_grad=False)

    def forward(self, s: Tensor) -> Tensor:
        """`(B,)` values to `(B, 2 * frequencies)`, in float32 or, for float64 values, in float64."""
        angles = 2 * math.pi * s.to(working_dtype(s))[:, None] * self.weight.to(working_dtype(s))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Condition(nn.Module):
    """Class labels or text features, each with a null value, so that one network also serves as its unconditional self.

    Needed by classifier-free guidance (arXiv 2207.12598): the null class is embedding row `num_classes`, the null text
    is one learned token. Attention over any number of equal tokens is attention over one of them, hence a text whose
    tokens are all null acts like `cond=None`.

    Args:
        dim: size of the pooled embedding.
        num_classes: number of classes; 0 for none.
        text_dim: size of a text token; 0 for none. Classes and text exclude each other.
    """

    def __init__(self, dim: int, num_classes: int = 0, text_dim: int = 0):
        super().__init__()
        if num_classes and text_dim:
            raise ValueError(f"a condition is a class or a text, got num_classes={num_classes} and text_dim={text_dim}")
        self.num_classes = num_classes
        self.text_dim = text_dim
        if num_classes:
            self.classes = nn.Embedding(num_classes + 1, dim)
            nn.init.normal_(self.classes.weight, std=0.02)
        if text_dim:
            self.null_token = nn.Parameter(torch.randn(text_dim) * 0.02)
            self.pool = nn.Linear(text_dim, dim)

    def drop(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` with the null condition in the rows where `mask` `(B,)` is true."""
        self._check(cond)
        if self.num_classes:
            return torch.where(mask, self.num_classes, cond)
        return torch.where(mask[:, None, None], self.null_token.to(cond.dtype), cond)

    def forward(self, cond: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Pooled embedding `(B, dim)` and text tokens `(B, L, text_dim)`; None for what this condition lacks.

        Raises:
            ValueError: `cond` does not fit the kind of condition.
        """
        if cond is not None:
            self._check(cond)
        if self.num_classes:
            null = self.classes.weight.new_full((batch,), self.num_classes, dtype=torch.long)
            return self.classes(null if cond is None else cond), None
        if self.text_dim:
            tokens = self.null_token.expand(batch, 1, -1) if cond is None else cond
            return self.pool(tokens.mean(1).to(self.pool.weight.dtype)), tokens
        return None, None

    def _check(self, cond: Tensor) -> None:
        if self.num_classes and (cond.ndim != 1 or cond.is_floating_point()):
            raise ValueError(f"expected int64 class labels (B,), got {cond.dtype} {tuple(cond.shape)}")
        if self.text_dim and (cond.ndim != 3 or cond.shape[-1] != self.text_dim or not cond.is_floating_point()):
            raise ValueError(
                f"expected float text features (B, L, {self.text_dim}), got {cond.dtype} {tuple(cond.shape)}"
            )
        if not self.num_classes and not self.text_dim:
            raise ValueError("this network is unconditional: set num_classes or text_dim to give it a condition")


class CrossAttention(nn.Module):
    """Attention from tokens to text tokens; the output projection starts at zero, so the text comes in gradually.

    Args:
        dim: size of the tokens.
        text_dim: size of the text tokens.
        heads: number of heads, a divisor of `dim`.
    """

    def __init__(self, dim: int, text_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(text_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """`(B, N, dim)` tokens and `(B, L, text_dim)` text to `(B, N, dim)`."""
        key, value = self.key_value(text.to(tokens.dtype)).chunk(2, dim=-1)
        return self.out(attend(self.query(tokens), key, value, self.heads))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head scaled dot-product attention of `(B, N, D)` queries over `(B, L, D)` keys and values."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def check_image_shape(shape: tuple[int, ...], divisor: int, what: str) -> None:
    """Raise ValueError unless `shape` is (C, H, W) with sides divisible by `divisor`."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (channels, height, width), got {tuple(shape)}")
    if shape[1] % divisor or shape[2] % divisor:
        raise ValueError(f"height and width must be multiples of {divisor} ({what}), got {shape[1]}x{shape[2]}")


def check_input(x: Tensor, t: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` is (B, *shape) and `t` is (B,)."""
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"expected samples of shape {tuple(shape)}, got {tuple(x.shape[1:])}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"expected times of shape {tuple(x.shape[:1])}, got {tuple(t.shape)}")
