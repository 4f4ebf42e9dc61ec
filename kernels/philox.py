"""Random numbers that are a pure function of (seed, stream name, epoch, sample index, element).

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011, doi 10.1145/2063384.2063405):
no state, hence the same numbers on any device, for any split of a batch over ranks, and after a resume.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import LongTensor, Tensor
from torch.compiler import is_compiling

from penstock.kernels.dispatch import jit, use_triton

if TYPE_CHECKING:
    import triton.language as tl

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_M0, _M1, _MASK, _HALF, _QUARTER = map(np.uint64, (*MULTIPLIERS, MASK, 32, 16))
CACHED = 16384  # blocks of four words whose temporaries stay in a CPU core's cache: twice as fast


class Draws:
    """The random numbers of one batch: row `b` of a draw depends on `index[b]` only, never on its neighbours.

    Element `e` of sample `i` is word `e % 4` of Philox4x32-10 with the counter
    `(e // 4, i mod 2^32, epoch XOR (i div 2^32) << 16, crc32(stream name))` and the two words of `seed` as key. Samples
    never share a counter while `index < 2^32` (any epoch) or `index < 2^48` and `epoch < 2^16`.

    Args:
        seed: of the experiment, in [0, 2^64).
        epoch: in [0, 2^32).
        index: the samples' numbers in their data set, int64 `(B,)`, on the device where the draws are wanted.

    Raises:
        ValueError: seed, epoch or index outside what is stated above.
    """

    def __init__(self, seed: int, epoch: int, index: LongTensor):
        if not 0 <= seed < 2**64:
            raise ValueError(f"Draws: seed {seed}, expected an integer in [0, 2^64)")
        if not 0 <= epoch < 2**32:
            raise ValueError(f"Draws: epoch {epoch}, expected an integer in [0, 2^32)")
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"Draws: index {index.dtype} of shape {tuple(index.shape)}, expected int64 of shape (B,)")
        self.seed = seed
        self.epoch = epoch
        self.index = index

    def uniform(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers in the open interval (0, 1) from the stream `name`.

        A multiple of 2^-24 (float32, 23 random bits) or 2^-33 (float64, 32 bits); the two differ by under 2^-23.

        Returns:
            `(B, *shape)`.

        Raises:
            ValueError: another dtype (half precision would round to 1: draw in float32 and cast).
        """
        return self._draw(name, shape, dtype, normal=False)

    def normal(self, name: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers from the stream `name`, by Box and Muller (1958) computed in `dtype`.

        Elements `2j` and `2j + 1` are `r cos(2 pi v)` and `r sin(2 pi v)` with `r = sqrt(-2 log u)`, `u` of 32 bits and
        `v` the uniform of its word; |z| < 6.77. Devices agree to a few units in the last place.

        Returns:
            `(B, *shape)`.

        Raises:
            ValueError: another dtype than float32 or float64.
        """
        return self._draw(name, shape, dtype, normal=True)

    def both(
        self,
        normal: tuple[str, tuple[int, ...]],
        uniform: tuple[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """`normal(*normal, dtype), uniform(*uniform)`: a small batch in float32 on the CPU takes one pass for the two.

        Args:
            normal: stream and shape of the normal numbers.
            uniform: stream and shape of the uniform ones, which are float32.
            dtype: of the normal numbers.

        Returns:
            `(B, *normal[1])` and `(B, *uniform[1])`.
        """
        sizes = [math.prod(shape) for _, shape in (normal, uniform)]
        blocks = [-(-n // 4) for n in sizes]
        small = dtype == torch.float32 and len(self.index) * sum(blocks) <= CACHED
        if not (small and _eager(self.index) and self.index.device.type == "cpu" and not use_triton(self.index)):
            return self.normal(*normal, dtype), self.uniform(*uniform)
        counters = [(stream(name), number) for (name, _), number in zip((normal, uniform), blocks)]
        words = _words_on_host(self.index.numpy().view(np.uint64), self.seed, self.epoch, counters)
        z = torch.from_numpy(_box_muller_host(words[0], np.dtype(np.float32))[:, : sizes[0]])
        u = _open_unit(torch.from_numpy(words[1])[:, : sizes[1]], torch.float32)
        return z.reshape(len(z), *normal[1]), u.view(len(u), *uniform[1])

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator keyed by (seed, epoch, stream `name`, the ordered `index`), which is copied to the host."""
        key = struct.pack("<QQ", self.seed, self.epoch) + name.encode() + b"\0"
        rows = self.index.cpu().numpy().astype("<i8").tobytes()
        digest = hashlib.blake2b(key + rows, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def _draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, normal: bool) -> Tensor:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"Draws: dtype {dtype}, expected torch.float32 or torch.float64")
        seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        n = math.prod(shape)
        draw = _philox if _eager(self.index) else philox
        flat = draw(self.index, seed, self.epoch, stream(name), n, normal, dtype)
        return flat.view(self.index.shape[0], *shape)


def _eager(index: Tensor) -> bool:
    """Whether nobody watches operators: the dispatch of one costs as much as a small draw."""
    return type(index) is Tensor and index.device.type in ("cpu", "cuda") and not is_compiling()


@torch.compiler.assume_constant_result
def stream(name: str) -> int:
    """The counter word of a stream: crc32 of its name."""
    return zlib.crc32(name.encode())


@torch.library.custom_op("penstock::philox", mutates_args=())
def philox(index: Tensor, seed: int, epoch: int, stream: int, n: int, normal: bool, dtype: torch.dtype) -> Tensor:
    """`n` draws for each sample of `index` `(B,)`; see `Draws` for the counter. `seed` as a signed 64-bit integer.

    Returns:
        `(B, n)` uniform in (0, 1) or standard normal.
    """
    return _philox(index, seed, epoch, stream, n, normal, dtype)


def _philox(index: Tensor, seed: int, epoch: int, stream: int, n: int, normal: bool, dtype: torch.dtype) -> Tensor:
    if use_triton(index):
        return _triton(index, seed, epoch, stream, n, normal, dtype)
    return reference(index, seed, epoch, stream, n, normal, dtype)


@philox.register_fake
def _(index, seed, epoch, stream, n, normal, dtype):
    return index.new_empty((index.shape[0], n), dtype=dtype)


def reference(index: Tensor, seed: int, epoch: int, stream: int, n: int, normal: bool, dtype: torch.dtype) -> Tensor:
    """The definition of `philox` in PyTorch; on the CPU it runs in NumPy, whose calls cost less and wake no threads."""
    blocks = -(-n // 4)
    if index.device.type == "cpu":
        rows = max(1, CACHED // max(1, blocks))
        if len(index) > rows:
            return torch.cat([reference(part, seed, epoch, stream, n, normal, dtype) for part in index.split(rows)])
        (words,) = _words_on_host(index.numpy().view(np.uint64), seed, epoch, [(stream, blocks)])
        if normal:
            return torch.from_numpy(_box_muller_host(words, np.dtype(str(dtype)[6:])))[:, :n].contiguous()
        return _open_unit(torch.from_numpy(words)[:, :n], dtype)
    i, block = index[:, None], torch.arange(blocks, device=index.device)[None]
    counter = block, i & MASK, epoch ^ (i >> 32 << 16) & MASK, torch.full((1, 1), stream, device=index.device)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(*counter, seed & MASK, seed >> 32 & MASK)), -1).flatten(1)
    if normal:
        return _box_muller(words, dtype)[:, :n].contiguous()
    return _open_unit(words[:, :n], dtype)


def _words_on_host(index: np.ndarray, seed: int, epoch: int, streams: list[tuple[int, int]]) -> list[np.ndarray]:
    """The words `(B, 4 blocks)` as int64 of each (stream, blocks): the rounds of `philox4x32` in place, flat arrays."""
    block = np.concatenate([np.arange(blocks, dtype=np.uint64) for _, blocks in streams])
    name = np.concatenate([np.full(blocks, stream, dtype=np.uint64) for stream, blocks in streams])
    i = np.repeat(index, len(block))
    c0, c3 = np.tile(block, len(index)), np.tile(name, len(index))
    c1, c2 = i & _MASK, epoch ^ (i >> _HALF << _QUARTER) & _MASK
    p0, p1 = np.empty_like(i), np.empty_like(i)
    for k0, k1 in _round_keys(seed & MASK, seed >> 32 & MASK):
        np.multiply(c0, _M0, p0)
        np.multiply(c2, _M1, p1)
        np.right_shift(p1, _HALF, c0)
        np.bitwise_xor(c0, c1, c0)
        np.bitwise_xor(c0, k0, c0)
        np.right_shift(p0, _HALF, c2)
        np.bitwise_xor(c2, c3, c2)
        np.bitwise_xor(c2, k1, c2)
        np.bitwise_and(p1, _MASK, c1)
        np.bitwise_and(p0, _MASK, c3)
    words = np.stack((c0, c1, c2, c3), 1).view(np.int64).reshape(len(index), 4 * len(block))
    ends = np.cumsum([4 * blocks for _, blocks in streams]).tolist()
    return [words[:, start:end] for start, end in zip([0, *ends], ends)]


@lru_cache(maxsize=8)
def _round_keys(k0: int, k1: int) -> list[tuple[np.uint64, np.uint64]]:
    return [(np.uint64(k0 + n * WEYL[0] & MASK), np.uint64(k1 + n * WEYL[1] & MASK)) for n in range(10)]


def philox4x32(c0, c1, c2, c3, k0: int, k1: int):
    """Ten rounds of Philox4x32 (section 4.3 of the paper).

    Written with operators that int64 tensors and NumPy uint64 arrays share: a product of two 32-bit words taken modulo
    2^64 has the right bits in both, and the mask after the shift removes the copies of the sign.

    Args:
        c0, c1, c2, c3: counter words, each in [0, 2^32), shapes that broadcast together.
        k0, k1: key words.

    Returns:
        Four arrays of random words in [0, 2^32).
    """
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def _open_unit(words: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return words.to(dtype).add_(0.5).mul_(2.0**-32)
    return (words >> 9).to(dtype).add_(0.5).mul_(2.0**-23)


def _box_muller(words: Tensor, dtype: torch.dtype) -> Tensor:
    radius = words[:, 0::2].to(dtype).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = _open_unit(words[:, 1::2], dtype).mul_(2 * math.pi)
    return torch.stack((angle.cos().mul_(radius), angle.sin().mul_(radius)), -1).flatten(1)


def _box_muller_host(words: np.ndarray, dtype: np.dtype) -> np.ndarray:
    radius = words[:, 0::2].astype(dtype)
    radius += 0.5
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    angle = _open_unit(torch.from_numpy(words[:, 1::2]), torch.from_numpy(radius).dtype).numpy()
    angle *= 2 * math.pi
    out = np.empty((*radius.shape, 2), dtype=dtype)
    np.multiply(np.cos(angle), radius, out=out[..., 0])
    np.multiply(np.sin(angle), radius, out=out[..., 1])
    return out.reshape(words.shape)


def _triton(index: Tensor, seed: int, epoch: int, stream: int, n: int, normal: bool, dtype: torch.dtype) -> Tensor:
    out = index.new_empty((index.shape[0], n), dtype=dtype)
    blocks = -(-n // 4)
    if out.numel():
        size = 256
        grid = (-(-index.shape[0] * blocks // size),)
        with torch.cuda.device_of(index):
            _kernel()[grid](
                index,
                out,
                seed,
                epoch,
                stream,
                n,
                blocks,
                index.shape[0] * blocks,
                index.stride(0),
                NORMAL=normal,
                DOUBLE=dtype == torch.float64,
                SIZE=size,
                WIDE=4 * (index.shape[0] * blocks + size) >= 2**31,
                enable_fp_fusion=False,
            )
    return out


@cache
def _kernel():
    return jit(_philox_kernel, do_not_specialize=("seed", "epoch", "stream"))


def _philox_kernel(
    index,
    out,
    seed,
    epoch,
    stream,
    n,
    blocks,
    total,
    stride,
    NORMAL: tl.constexpr,
    DOUBLE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    group = program * SIZE + tl.arange(0, SIZE)
    block = group % blocks
    i = tl.load(index + (group // blocks).to(tl.int64) * stride, mask=group < total, other=0)
    c1 = i.to(tl.uint32)
    c2 = epoch.to(tl.uint32) ^ ((i >> 32) << 16).to(tl.uint32)
    c3 = tl.zeros_like(c1) + stream.to(tl.uint32)
    x0, x1, x2, x3 = tl.philox(seed.to(tl.uint64), block.to(tl.uint32), c1, c2, c3)
    if DOUBLE:
        y0, y1 = (x0.to(tl.float64) + 0.5) * 2.0**-32, (x1.to(tl.float64) + 0.5) * 2.0**-32
        y2, y3 = (x2.to(tl.float64) + 0.5) * 2.0**-32, (x3.to(tl.float64) + 0.5) * 2.0**-32
    else:
        y1, y3 = ((x1 >> 9).to(tl.float32) + 0.5) * 2.0**-23, ((x3 >> 9).to(tl.float32) + 0.5) * 2.0**-23
        if NORMAL:
            y0, y2 = (x0.to(tl.float32) + 0.5) * 2.0**-32, (x2.to(tl.float32) + 0.5) * 2.0**-32
        else:
            y0, y2 = ((x0 >> 9).to(tl.float32) + 0.5) * 2.0**-23, ((x2 >> 9).to(tl.float32) + 0.5) * 2.0**-23
    if NORMAL:
        r0, r2 = tl.sqrt(-2.0 * tl.log(y0)), tl.sqrt(-2.0 * tl.log(y2))
        a1, a3 = y1 * 6.283185307179586, y3 * 6.283185307179586
        y0, y1 = r0 * tl.cos(a1), r0 * tl.sin(a1)
        y2, y3 = r2 * tl.cos(a3), r2 * tl.sin(a3)
    y = tl.interleave(tl.interleave(y0, y2), tl.interleave(y1, y3))
    place = program * (4 * SIZE) + tl.arange(0, 4 * SIZE)
    element = place // 4 % blocks * 4 + place % 4
    keep = (place // 4 < total) & (element < n)
    tl.store(out + place // 4 // blocks * n + element, y, mask=keep)
