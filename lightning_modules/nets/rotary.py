"""Rotary position encodings of sequences that are text, then a grid of frames, rows and columns (arXiv 2104.09864)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

THIRD = 8


@dataclass(frozen=True)
class Rotary:
    """Angles of the pairs of a head's features, by place (arXiv 2506.06276, 2511.20462, official code).

    | axes | pairs | frequencies | places of the grid | of text token j of L |
    |---|---|---|---|---|
    | 3 | h/4 - 4 for rows, as many for columns | `10000^(-2i / (h/2 - 8))` | `s (row, column)` | 0, 0 |
    | | 8 for frames | `10000^(-i / 8)` | frame | `j side / L` |
    | 2 | h/4 for rows, h/4 for columns | `10000^(-2i / (h/2))` | `s (row, column)` | no text |
    | 1 | h/2 | `10000^(-2i / h)` | L, L + 1, ... in raster order | j |

    with `s = side / sqrt(rows columns)`: a larger grid covers the same range. With 2 and 3 axes neighbouring features
    are rotated, with 1 the two halves of a head, as in language models.

    Args:
        head_dim: h, features of a head: a multiple of 4, with 3 axes at least 20, with 1 an even number.
        axes: Of the grid.
        side: Rows and columns of the square grid of training.

    Raises:
        ValueError: a head that cannot be shared out so.
    """

    head_dim: int
    axes: Literal[1, 2, 3] = 3
    side: float = 32.0

    def __post_init__(self):
        factor, least = {1: (2, 2), 2: (4, 4), 3: (4, 20)}[self.axes]
        if self.head_dim < least or self.head_dim % factor:
            raise ValueError(f"Rotary: heads of {self.head_dim}, expected a multiple of {factor}, at least {least}")

    def angles(self, grid: tuple[int, int, int], text: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Angles `(text + frames rows columns, head_dim / 2)` of a sequence, on the CPU.

        Args:
            grid: Frames, rows and columns.
            text: Tokens in front of the grid.
            dtype: float32 or float64.

        Raises:
            ValueError: text with 2 axes.
        """
        frames, height, width = grid
        double = torch.float64
        if self.axes == 1:
            places = torch.arange(text + frames * height * width, dtype=double)[:, None]
            return (places * _frequencies(self.head_dim // 2, self.head_dim, 2)).to(dtype)
        if self.axes == 2 and text:
            raise ValueError("Rotary: a sequence with text needs 1 or 3 axes")
        scale = self.side / math.sqrt(height * width)
        frame, row, column = torch.meshgrid(
            *(torch.arange(n, dtype=double) for n in (frames, height, width)), indexing="ij"
        )
        places = torch.stack([scale * row, scale * column, frame], -1).reshape(-1, 3)
        words = torch.zeros(text, 3, dtype=double)
        words[:, 2] = torch.arange(text, dtype=double) * (self.side / max(text, 1))
        row, column, frame = torch.cat([words, places]).split(1, 1)
        third = THIRD if self.axes == 3 else 0
        spatial = self.head_dim // 2 - third
        own = _frequencies(spatial // 2, spatial, 2)
        found = [row * own, column * own, frame * _frequencies(third, THIRD, 1)]
        return torch.cat(found, 1).to(dtype)


def _frequencies(number: int, size: int, step: int) -> Tensor:
    return 10000.0 ** (-step * torch.arange(number, dtype=torch.float64) / size)
