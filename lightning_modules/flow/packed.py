"""Inner products of many long rows that do not fit into memory: 4 bits a number, rounded at random."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 512  # numbers that share a scale
PIECE = 2  # blocks of all rows that are unpacked at once
SEED = 0x4B175  # of the rounding: none that data are likely to be drawn with


class PackedRows:
    """Rows `(R, M)` of float32 in an eighth of their memory, and the inner products of all pairs.

    A number is -7 .. 7 times the scale of its block, rounded up or down with the odds that make its mean exact; 0 stays
    0. So inner products of two rows have no bias, and an error that falls with `M`: some ten-thousandths of the product
    of their norms for 300,000 normal numbers. A row's product with itself is taken before it is rounded.

    Args:
        rows: R.
        columns: M.
        device: where they are.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu"):
        blocks = -(-columns // BLOCK)
        self.codes = torch.empty(rows, blocks, BLOCK // 2, dtype=torch.uint8, device=device)
        self.scales = torch.ones(rows, blocks, 1, device=device)
        self.squares = torch.zeros(rows, dtype=torch.float64, device=device)
        self._padding = blocks * BLOCK - columns
        self._generator = torch.Generator(device).manual_seed(SEED)

    def __setitem__(self, i: int, row: Tensor) -> None:
        """Stores row i, `(M,)`."""
        row = (pad(row, (0, self._padding)) if self._padding else row).view(-1, BLOCK)
        norms = row.norm(dim=1)
        self.squares[i] = norms.double().square().sum()
        scale = row.norm(torch.inf, dim=1, keepdim=True).div_(7).clamp_(min=torch.finfo(row.dtype).tiny)
        self.scales[i] = scale
        codes = torch.rand(row.shape, generator=self._generator, device=row.device)
        codes = codes.addcdiv_(row, scale).floor_().clamp_(-7, 7).add_(8).to(torch.uint8)
        torch.bitwise_or(codes[:, ::2], codes[:, 1::2] << 4, out=self.codes[i])

    def gram(self) -> Tensor:
        """Inner products `(R, R)`, float64."""
        total = self.scales.new_zeros(len(self.codes), len(self.codes), dtype=torch.float64)
        for codes, scales in zip(self.codes.split(PIECE, dim=1), self.scales.split(PIECE, dim=1)):
            numbers = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(2).double().sub_(8).mul_(scales).flatten(1)
            total.addmm_(numbers, numbers.T)
        total.diagonal().copy_(self.squares)
        return total
