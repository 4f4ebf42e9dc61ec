"""The network that learns a video flow's score and takes the training noise away (arXiv 2511.20462)."""

from typing import Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.nets.autoregressive import Grid
from penstock.lightning_modules.nets.causal_transformer import Layer, RMSNorm, plain_layer
from penstock.lightning_modules.nets.rotary import Rotary

Sight = Literal["first_layer", "every_layer"]


def frame_mask(frames: int, size: int, text: int, ahead: int, window: int | None, text_reads: bool) -> Tensor:
    """Which key (column) a query (row) may see, bool `(text + frames size, the same)`, text first.

    All see the text. A token of frame n sees frames `n + ahead - window, ..., n + ahead`; a text token frames up to
    `ahead`, if it reads any.

    Args:
        frames: Number of frames.
        size: Tokens of a frame.
        text: Text tokens.
        ahead: Frames of look-ahead.
        window: Frames before the last that is seen; None is all.
        text_reads: Whether text tokens see frames.
    """
    place = torch.arange(text + frames * size) - text
    frame, is_text = place.div(size, rounding_mode="floor"), place < 0
    of_query = torch.where(is_text, 0, frame)
    seen = frame[None] <= of_query[:, None] + ahead
    if window is not None:
        seen &= frame[None] >= frame[:, None] + ahead - window
    if not text_reads:
        seen &= ~is_text[:, None]
    return seen | is_text[None]


class FlowDenoiser(nn.Module):
    """`d(x, text)`, an estimate of the score's gradient step for every token of a noisy clip.

    With `first_layer` the first layer alone sees one frame ahead, so that frame n of the result depends on frames up to
    n + 1; text tokens see text only. With `every_layer` each layer looks ahead, text included, as in the released
    network: with L layers frame n depends on frames up to n + L.

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
        turn, masks = (angles.cos(), angles.sin()), self.masks(grid, length) if video else [None, None]
        for i, layer in enumerate(self.attn_blocks):
            mask = masks[min(i, 1)]
            x = layer(x, turn, None if mask is None else mask.to(x.device))
        return self.proj_out(self.final_norm(x[:, length:])).unflatten(1, tokens.shape[1:3])

    def masks(self, grid: Grid, text: int) -> list[Tensor]:
        """Masks of the first layer and of the others, see `frame_mask`."""
        released, size = self.sight == "every_layer", grid[1] * grid[2]
        ahead = (self.ahead, self.ahead if released else 0)
        return [frame_mask(grid[0], size, text, a, self.window, released) for a in ahead]


def starflow_v_7b_denoiser(channels: int = 48, text_dim: int = 2048, sight: Sight = "every_layer") -> FlowDenoiser:
    """The denoiser of the released STARFlow-V (arXiv 2511.20462): 912,884,784 parameters."""
    return FlowDenoiser(channels, 3072, 8, 64, text_dim, 32.0, 10, sight)
