"""The network that learns a video flow's score and takes the training noise away (arXiv 2511.20462)."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from penstock.kernels.dispatch import use_triton
from penstock.lightning_modules.nets.autoregressive import Grid
from penstock.lightning_modules.nets.causal_transformer import Layer, RMSNorm, plain_layer
from penstock.lightning_modules.nets.rotary import Rotary

Sight = Literal["first_layer", "every_layer"]
Device = torch.device | str
BLOCK = 128
SPARSE = 2048


def frame_rule(frames: int, ahead: int, window: int | None, text_reads: bool) -> Tensor:
    """Which frame (column) a frame (row) may see, bool `(1 + frames, 1 + frames)`; row and column 0 are the text.

    All see the text. Frame n sees frames `n + ahead - window, ..., n + ahead`; the text frames up to `ahead`, if it
    reads any.

    Args:
        frames: Number of frames.
        ahead: Frames of look-ahead.
        window: Frames before the last that is seen; None is all.
        text_reads: Whether text tokens see frames.
    """
    frame = torch.arange(frames)
    last = frame + ahead
    rule = torch.zeros(1 + frames, 1 + frames, dtype=torch.bool)
    rule[:, 0] = True
    rule[0, 1:] = (frame <= ahead) & text_reads
    rule[1:, 1:] = frame <= last[:, None]
    if window is not None:
        rule[1:, 1:] &= frame >= last[:, None] - window
    return rule


def rows_of_rule(frames: int, size: int, text: int) -> Tensor:
    """Row of `frame_rule` of each token `(text + frames size,)`, text first."""
    return torch.cat([torch.zeros(text, dtype=torch.long), torch.arange(1, frames + 1).repeat_interleave(size)])


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def frame_mask(
    frames: int,
    size: int,
    text: int,
    ahead: int,
    window: int | None,
    text_reads: bool,
    device: Device = "cpu",
) -> Tensor:
    """Which key (column) a query (row) may see, bool `(text + frames size, the same)`: `frame_rule` token by token.

    Args:
        frames: Number of frames.
        size: Tokens of a frame.
        text: Text tokens.
        ahead: See `frame_rule`.
        window: See there.
        text_reads: See there.
        device: Of the result, which is kept for the next call.
    """
    row, rule = rows_of_rule(frames, size, text), frame_rule(frames, ahead, window, text_reads)
    return rule[row][:, row].to(device)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def frame_blocks(
    frames: int,
    size: int,
    text: int,
    ahead: int,
    window: int | None,
    text_reads: bool,
    device: Device = "cpu",
) -> BlockMask:
    """`frame_mask` for FlexAttention: blocks of 128 x 128 that hold something, and those that are all seen.

    It follows from the frames that a block holds; nothing of the size of the mask is ever made.
    """
    row, rule = rows_of_rule(frames, size, text), frame_rule(frames, ahead, window, text_reads)
    places = len(row)
    padded = F.pad(row, (0, -places % BLOCK), value=1 + frames)
    holds = F.one_hot(padded, 2 + frames).view(-1, BLOCK, 2 + frames).amax(1).float()
    allowed = F.pad(rule, (0, 1, 0, 1)).float()
    whole = holds @ (1 - allowed) @ holds.T == 0
    mixed = (holds @ allowed @ holds.T > 0) & ~whole
    row, rule = row.to(device), rule.to(device)
    sets = [x for dense in (mixed, whole) for x in _ordered(dense.to(device))]
    return BlockMask.from_kv_blocks(
        *sets, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, q, k: rule[row[q], row[k]], seq_lengths=(places, places)
    )


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of each row are set, and the columns, those that are set first."""
    return dense.sum(-1).int()[None, None], dense.int().argsort(descending=True, stable=True).int()[None, None]


class FlowDenoiser(nn.Module):
    """`d(x, text)`, an estimate of the score's gradient step for every token of a noisy clip.

    With `first_layer` the first layer alone sees one frame ahead, so that frame n of the result depends on frames up to
    n + 1; text tokens see text only. With `every_layer` each layer looks ahead, text included, as in the released
    network: with L layers frame n depends on frames up to n + L.

    From 2048 tokens on, text included, and where kernels run in Triton, attention is block-sparse (FlexAttention, arXiv
    2412.05496); float64, and all else, takes a dense mask.

    Args:
        channels: Numbers of a token.
        dim: Width.
        depth: Layers.
        head_dim: Features of a head.
        text_dim: Numbers of a text token; 0 is none.
        side: See `Rotary`.
        window: Frames that a layer sees, before the last it sees; None is all.
        sight: See above.
        ahead: Frames of look-ahead of a layer that has one; 0 is none.
    """

    checkpoint_blocks = (Layer,)

    def __init__(
        self,
        channels: int,
        dim: int = 3072,
        depth: int = 8,
        head_dim: int = 64,
        text_dim: int = 0,
        side: float = 32.0,
        window: int | None = 10,
        sight: Sight = "first_layer",
        ahead: int = 1,
    ):
        super().__init__()
        self.window, self.sight, self.ahead, self.text_dim = window, sight, ahead, text_dim
        self.rotary = Rotary(head_dim, 3, side)
        self.proj_in, self.proj_out = nn.Linear(channels, dim), nn.Linear(dim, channels)
        nn.init.zeros_(self.proj_out.weight)
        if text_dim:
            self.proj_txt = nn.Linear(text_dim, dim)
        self.attn_blocks = nn.ModuleList(plain_layer(dim, head_dim, causal=False) for _ in range(depth))
        self.final_norm = RMSNorm(dim)

    def forward(self, tokens: Tensor, grid: Grid, text: Tensor | None = None, video: bool = True) -> Tensor:
        """Tokens `(B, T, F, C)` of noisy frames to the same shape.

        Args:
            tokens: Of the frames.
            grid: Frames, rows and columns.
            text: `(B, L, text_dim)`, where the net takes text.
            video: Whether frames are hidden from one another; an image has nothing to hide.
        """
        x, length = self.proj_in(tokens.flatten(1, 2)), 0
        if self.text_dim:
            text = self.proj_txt(text)
            x, length = torch.cat([text, x], 1), text.shape[1]
        angles = self.rotary.angles(grid, length, torch.promote_types(x.dtype, torch.float32)).to(x.device)
        turn, masks = (angles.cos(), angles.sin()), [None, None]
        if video:
            sparse = x.shape[1] >= SPARSE and use_triton(x) and x.dtype != torch.float64
            masks = self.masks(grid, length, x.device, frame_blocks if sparse else frame_mask)
        for i, layer in enumerate(self.attn_blocks):
            x = layer(x, turn, masks[min(i, 1)])
        return self.proj_out(self.final_norm(x[:, length:])).unflatten(1, tokens.shape[1:3])

    def masks(
        self,
        grid: Grid,
        text: int,
        device: Device = "cpu",
        make: Callable[..., Tensor | BlockMask] = frame_mask,
    ) -> list[Tensor | BlockMask]:
        """Masks of the first layer and of the others, by `frame_mask` or `frame_blocks`."""
        released, size = self.sight == "every_layer", grid[1] * grid[2]
        ahead = (self.ahead, self.ahead if released else 0)
        return [make(grid[0], size, text, a, self.window, released, device) for a in ahead]


def starflow_v_7b_denoiser(channels: int = 48, text_dim: int = 2048, sight: Sight = "every_layer") -> FlowDenoiser:
    """The denoiser of the released STARFlow-V (arXiv 2511.20462): 912,884,784 parameters."""
    return FlowDenoiser(channels, 3072, 8, 64, text_dim, 32.0, 10, sight)
