"""Causal transformers over text and tokens, with a cache of keys and values for decoding."""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from penstock.kernels.cached_attention import cached_attention
from penstock.kernels.rotary import rotate

Norm = Literal["layer", "rms"]
Turn = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """`x / rms(x) (1 + weight)` over the last axis, in float32 at least; `weight` starts at 0.

    Args:
        dim: Size of the last axis.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gain = 1 + self.weight.to(wide.dtype)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * gain).to(x.dtype)


def _norm(kind: Norm, dim: int) -> nn.Module:
    return nn.LayerNorm(dim) if kind == "layer" else RMSNorm(dim)


class Cache:
    """Rotated keys and values of all layers, `(layers, B, heads, length, head_dim)`, filled from the front.

    Args:
        layers: Number of layers.
        batch: B.
        heads: Heads of keys and values.
        length: Places.
        head_dim: Features of a head.
        device: Of the cache.
        dtype: Of the cache; half the memory in bfloat16.

    Attributes:
        start: Place that the next tokens are written at; what was there and after it is forgotten.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        shape = (layers, batch, heads, length, head_dim)
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.start = 0

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        turn: Turn | None = None,
        halves: bool = False,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Writes tokens of a layer at `start`; each sees what is before them, itself and those before it.

        Args:
            layer: Which.
            query: Before rotation `(B, all heads, n, head_dim)`.
            key: Before rotation `(B, heads, n, head_dim)`.
            value: Of the same shape.
            turn: See `Attention`.
            halves: See there.
            temperature: See there.

        Raises:
            ValueError: the cache is too short.
        """
        end = self.start + key.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"Cache: {end} tokens, expected at most {self.keys.shape[3]}")
        keys, values = self.keys[layer], self.values[layer]
        return cached_attention(
            query, key, value, keys, values, self.start, *(turn or (None, None)), halves, temperature
        )


class Attention(nn.Module):
    """Multi-head attention of normed tokens.

    Args:
        dim: Size of a token.
        head_dim: Features of a head.
        heads: Of queries; None is `dim / head_dim`.
        kv_heads: Of keys and values, a divisor of `heads`; None is `heads`.
        norm: Of the tokens.
        qk_norm: Norm queries and keys before they are rotated.
        post_norm: Norm the result.
        bias: Of the linear layers.
        halves: How features are paired, see `rotate`.
        causal: Whether a token sees itself and those before it only, where there is no mask.

    Raises:
        ValueError: a width that is no multiple of a head's, where the number of heads follows from it.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        heads: int | None = None,
        kv_heads: int | None = None,
        norm: Norm = "layer",
        qk_norm: bool = False,
        post_norm: bool = False,
        bias: bool = True,
        halves: bool = False,
        causal: bool = True,
    ):
        super().__init__()
        if heads is None and dim % head_dim:
            raise ValueError(f"Attention: width {dim}, expected a multiple of {head_dim} (the size of a head)")
        self.heads, self.head_dim = heads or dim // head_dim, head_dim
        self.halves, self.causal = halves, causal
        self.kv_heads = kv_heads or self.heads
        self.sizes = [self.heads * head_dim, self.kv_heads * head_dim, self.kv_heads * head_dim]
        self.norm = _norm(norm, dim)
        self.qkv = nn.Linear(dim, sum(self.sizes), bias)
        self.proj = nn.Linear(self.sizes[0], dim, bias)
        self.query_norm, self.key_norm = (RMSNorm(head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.post_norm = RMSNorm(dim) if post_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        turn: Turn | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Tokens `(B, n, dim)` to the same shape.

        Args:
            x: Tokens; with a cache, those after what is in it.
            turn: Cosines and sines `(at least N, head_dim / 2)` of all N places, those in the cache included.
            mask: `(n, n)`, true where a query (row) may see a key, or the blocks of one for FlexAttention; None is
                causal, or with `causal` off, none.
            cache: What earlier tokens left; the attention is causal.
            layer: Which of the cache's layers this is.
            temperature: `(B, 1, 1, 1)`, which divides the logits of a sample.

        Raises:
            ValueError: a cache, and a mask or `causal` off.
        """
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).split(self.sizes, -1)
        )
        query, key = self.query_norm(query), self.key_norm(key)
        if cache is not None:
            if mask is not None or not self.causal:
                raise ValueError("Attention: a cache is for causal attention without a mask")
            found = cache.attend(layer, query, key, value, turn, self.halves, temperature)
            return self.post_norm(self.proj(found.transpose(1, 2).flatten(2)))
        if temperature is not None:
            query = query / temperature
        if turn is not None:
            cos, sin = (table[: query.shape[2]] for table in turn)
            query, key = (rotate(x, cos, sin, self.halves) for x in (query, key))
        query, options = (
            query.to(value.dtype),
            {"scale": self.head_dim**-0.5, "enable_gqa": self.kv_heads != self.heads},
        )
        if isinstance(mask, BlockMask):
            found = _flex(query.is_cuda)(query, key, value, block_mask=mask, **options)
        else:
            causal = self.causal and mask is None
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, **options)
        return self.post_norm(self.proj(found.transpose(1, 2).flatten(2)))


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention, which is sparse only once it is compiled; as it is, it runs on the CPU, without gradients."""
    return torch.compile(flex_attention) if compiled else flex_attention


class Mlp(nn.Module):
    """Two layers with an exact GELU on normed tokens.

    Args:
        dim: Size of a token.
        ratio: Hidden size in units of it.
    """

    def __init__(self, dim: int, ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.norm = nn.LayerNorm(dim)
        self.main = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(self.norm(x))


class GatedMlp(nn.Module):
    """`W_3 (gelu(W_1 x) * W_2 x)` on normed tokens, with the tanh form of GELU and no biases (Gemma).

    Args:
        dim: Size of a token.
        ratio: Hidden size in units of it.
    """

    def __init__(self, dim: int, ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.norm, self.post_norm = RMSNorm(dim), RMSNorm(dim)
        self.gate_proj, self.up_proj = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.post_norm(self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)))


class Layer(nn.Module):
    """`x += attention(x)`, `x += mlp(x)`.

    Args:
        attention: Of the layer.
        mlp: Of the layer.
    """

    def __init__(self, attention: Attention, mlp: nn.Module):
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(
        self,
        x: Tensor,
        turn: Turn | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """See `Attention`."""
        x = x + self.attention(x, turn, mask, cache, layer, temperature)
        return x + self.mlp(x)


def plain_layer(dim: int, head_dim: int = 64, causal: bool = True) -> Layer:
    """A layer of STARFlow: layer norms, biases, GELU."""
    return Layer(Attention(dim, head_dim, causal=causal), Mlp(dim))


def gemma_layer(
    dim: int, head_dim: int = 256, heads: int = 8, kv_heads: int = 4, qk_norm: bool = False, ratio: float = 4.0
) -> Layer:
    """A layer of Gemma 2 (Gemma 3 with `qk_norm`): RMS norms before and after, a gated MLP, grouped queries."""
    return Layer(Attention(dim, head_dim, heads, kv_heads, "rms", qk_norm, True, False, True), GatedMlp(dim, ratio))
