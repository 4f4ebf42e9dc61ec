"""A block of an autoregressive affine flow: every token's law follows from those before it (arXiv 2506.06276)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels.affine import Scale, encode, moments
from penstock.lightning_modules.nets.causal_transformer import Cache, Layer, RMSNorm, Turn, plain_layer
from penstock.lightning_modules.nets.rotary import Rotary

Grid = tuple[int, int, int]
Guidance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Encoded(NamedTuple):
    """What a block makes of its input.

    Attributes:
        z: Noise side `(B, D, C)`.
        logdet: `-log sigma` `(B, D, C)`, in float32 at least.
        raw: The network's output before the clip `(B, D, 2 C)`.
        text: What `prefix` gave, after the last layer `(B, L, dim)`, or None.
    """

    z: Tensor
    logdet: Tensor
    raw: Tensor
    text: Tensor | None


class AutoregressiveBlock(nn.Module):
    """`z_i = (u_i - mu_i) / sigma_i`, with the laws from a causal transformer on `[text; s, u_1 .. u_(D-1)]`.

    Args:
        channels: C, numbers of a token.
        dim: Width of the transformer.
        depth: Its layers.
        rotary: Encoding of places; None is none.
        text_dim: Numbers of a text token; 0 is no text.
        scale: See `kernels.affine.moments`.
        soft_clip: See there.
        start_token: Whether s is learned; else the first token stays as it is, and stands for s.
        final_norm: Whether an RMS norm comes before the last linear layer.
        project_text: Whether text goes through a linear layer; else its width is `dim`.
        layer: Makes a layer.

    Raises:
        ValueError: text of another width without a projection.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        depth: int,
        rotary: Rotary | None,
        text_dim: int = 0,
        scale: Scale = "softplus",
        soft_clip: float = 4.0,
        start_token: bool = True,
        final_norm: bool = True,
        project_text: bool = True,
        layer: Callable[[int], Layer] = plain_layer,
    ):
        super().__init__()
        if text_dim and not project_text and text_dim != dim:
            raise ValueError(f"text of {text_dim} numbers without a projection, expected {dim}")
        self.channels, self.rotary, self.text_dim = channels, rotary, text_dim
        self.scale, self.soft_clip = scale, soft_clip
        self.proj_in, self.proj_out = nn.Linear(channels, dim), nn.Linear(dim, channels * (1 + (scale != "one")))
        nn.init.zeros_(self.proj_out.weight)
        self.sos_embed = nn.Parameter(torch.randn(1, 1, channels)) if start_token else None
        if text_dim:
            self.proj_txt = nn.Linear(text_dim, dim) if project_text else nn.Identity()
        self.attn_blocks = nn.ModuleList(layer(dim) for _ in range(depth))
        self.final_norm = RMSNorm(dim) if final_norm else nn.Identity()

    def forward(self, u: Tensor, grid: Grid, cond: Tensor | None = None) -> Encoded:
        """Data side to noise side, all tokens at once.

        Args:
            u: Tokens `(B, D, C)`.
            grid: Frames, rows and columns; their product is D.
            cond: Text `(B, L, text_dim)`, where there is any.
        """
        first, rest = self.split(u)
        text = self.prefix(cond)
        x, length = self.embed(torch.cat([first, rest[:, :-1]], 1), 0, cond), 0
        if text is not None:
            x, length = torch.cat([text, x], 1), text.shape[1]
        turn = self.turn(grid, length, u)
        for i, layer in enumerate(self.attn_blocks):
            x = layer(x, turn, layer=i)
        x = self.final_norm(x)
        raw = self.proj_out(x[:, length:])
        z, logdet = encode(raw, rest, self.scale, self.soft_clip)
        if self.sos_embed is None:
            z, logdet = torch.cat([first, z], 1), F.pad(logdet, (0, 0, 1, 0))
        return Encoded(z, logdet, raw, x[:, :length] if length else None)

    def split(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """What the first law follows from, `(B, 1, C)`, and the tokens that have laws."""
        if self.sos_embed is None:
            return u[:, :1], u[:, 1:]
        return self.sos_embed.to(u.dtype).expand(len(u), -1, -1), u

    def prefix(self, cond: Tensor | None) -> Tensor | None:
        """Tokens `(B, L, dim)` that stand before all others, or None.

        Raises:
            ValueError: no text for a block that takes some.
        """
        if not self.text_dim:
            return None
        if cond is None:
            raise ValueError(f"expected text (B, L, {self.text_dim}), got none")
        return self.proj_txt(cond.to(self.proj_in.weight.dtype))

    def embed(self, x: Tensor, start: int, cond: Tensor | None) -> Tensor:
        """Tokens `(B, n, C)` from a place on as the transformer's `(B, n, dim)`."""
        return self.proj_in(x.to(self.proj_in.weight.dtype))

    def turn(self, grid: Grid, text: int, like: Tensor) -> Turn | None:
        """Cosines and sines of all places, on the device of `like`."""
        if self.rotary is None:
            return None
        angles = self.rotary.angles(grid, text, torch.promote_types(like.dtype, torch.float32)).to(like.device)
        return angles.cos(), angles.sin()


class Decoder:
    """The laws of a block's tokens, in chunks against a cache: what an inverse asks.

    With guidance the batch is there twice, with the condition and with the weak one; both halves get the same tokens.

    Args:
        block: The block.
        grid: Frames, rows and columns of the whole sequence.
        batch: Samples.
        cond: Condition, where the block takes one.
        weak: The same of the unconditional half.
        guidance: `mu` and `sigma` of the conditional mean and scale, the unconditional ones and places in (0, 1], see
            `flow.affine`; None does without.
        temperature: Of the attention in the unconditional half.
        dtype: Of the cache; None is that of the weights.

    Attributes:
        tokens: That the network was asked for, in all calls together.

    Raises:
        ValueError: guidance and a condition, but none of the unconditional half.
    """

    def __init__(
        self,
        block: AutoregressiveBlock,
        grid: Grid,
        batch: int,
        cond: Tensor | None = None,
        weak: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        dtype: torch.dtype | None = None,
    ):
        self.block, self.guidance, self.tokens = block, guidance, 0
        weights, attention = block.proj_in.weight, block.attn_blocks[0].attention
        if guidance is not None and cond is not None:
            if weak is None:
                raise ValueError("guidance: expected a condition of the unconditional half, got none")
            cond = torch.cat([cond, weak])
        self.cond, text = cond, block.prefix(cond)
        self.length, self.total = 0 if text is None else text.shape[1], grid[0] * grid[1] * grid[2]
        batch *= 1 if guidance is None else 2
        places, heads, size = self.length + self.total, attention.kv_heads, attention.head_dim
        self.cache = Cache(len(block.attn_blocks), batch, heads, places, size, weights.device, dtype or weights.dtype)
        self.turn, self.temperature = block.turn(grid, self.length, weights), None
        if guidance is not None and temperature != 1:
            self.temperature = torch.ones(batch, 1, 1, 1, device=weights.device, dtype=weights.dtype)
            self.temperature[batch // 2 :] = temperature
        if text is not None:
            self._run(text, 0)

    def __call__(self, before: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """`mu` and `sigma` `(B, n, C)` of the tokens from `start` on; what was known of later places is forgotten.

        Args:
            before: The tokens before each of them `(B, n, C)`, from the one at `start - 1` (or the start token) on.
            start: Place of the first law.
        """
        n = before.shape[1]
        self.tokens += n
        x = before if self.guidance is None else torch.cat([before, before])
        x = self._run(self.block.embed(x, start, self.cond), self.length + start)
        raw = self.block.proj_out(self.block.final_norm(x))
        mu, sigma = moments(raw, self.block.scale, self.block.soft_clip)
        if self.guidance is None:
            return mu, sigma
        (mu_c, mu_u), (sigma_c, sigma_u) = mu.chunk(2), sigma.chunk(2)
        laws = self.total - (self.block.sos_embed is None)
        place = torch.arange(start + 1, start + n + 1, device=mu.device, dtype=mu.dtype) / laws
        return self.guidance(mu_c, sigma_c, mu_u, sigma_u, place)

    def _run(self, x: Tensor, start: int) -> Tensor:
        self.cache.start = start
        for i, layer in enumerate(self.block.attn_blocks):
            x = layer(x, self.turn, cache=self.cache, layer=i, temperature=self.temperature)
        return x
