"""A stack of autoregressive affine blocks on images or clips, from data to noise and back."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from penstock.lightning_modules.nets.autoregressive import AutoregressiveBlock, Decoder, Grid, Guidance
from penstock.lightning_modules.nets.causal_transformer import Layer

Order = Literal["L2R", "R2L"]
Inverse = Callable[..., tuple[Tensor, Any]]


class Flow(NamedTuple):
    """Noise side of a sample, and how it came about.

    Attributes:
        z: Noise, shape of the data.
        logdets: `-log sigma` of each block, unreduced, data side first, in the block's order of tokens
            `(B, T, F, C)`.
        states: Tokens `(B, T, F, C)` before the first block and after each, in raster order.
    """

    z: Tensor
    logdets: list[Tensor]
    states: list[Tensor]


class AutoregressiveFlow(nn.Module):
    """Data to noise through blocks 0, 1, ..., N - 1; the last is the deep one.

    A sample is an image `(C, H, W)` or a clip `(T, C, H, W)`; a token is a patch (its channels fastest), in raster
    order, frame by frame. Blocks read it forwards and backwards in turns, frames always forwards.

    Args:
        blocks: Data side first.
        shape: `(C, H, W)`, or `(T, C, H, W)`.
        patch: Side of a patch.
        order: Blocks 0, 2, ... flip the tokens of every frame (`L2R`), or the others do (`R2L`).
        frame_local: Whether all blocks but the last see one frame only; then frame n of the data depends on frames up
            to n of the noise, and the other way round.

    Raises:
        ValueError: a shape of another number of axes, sides that are no multiples of the patch, or another order.

    Attributes:
        checkpoint_blocks: What recomputes and is sharded as one.
        forward_methods: What a sharded network gathers its weights for, besides `forward`.
    """

    checkpoint_blocks = (Layer,)
    forward_methods = ("decode",)
    num_classes = 0

    def __init__(
        self,
        blocks: Sequence[AutoregressiveBlock],
        shape: Sequence[int],
        patch: int = 1,
        order: Order = "L2R",
        frame_local: bool = True,
    ):
        super().__init__()
        if order not in ("L2R", "R2L"):
            raise ValueError(f"order '{order}', expected L2R or R2L")
        self.shape, self.patch, self.order, self.frame_local = check_shape(shape, patch), patch, order, frame_local
        self.blocks = nn.ModuleList(blocks)

    def tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Data `(B, [T,] C, H, W)` as tokens `(B, T, F, C patch^2)`, and the grid.

        Raises:
            ValueError: another number of axes, channels, or sides that are no multiples of the patch.
        """
        rank, channels, p = len(self.shape), self.shape[-3], self.patch
        if x.ndim not in (4, rank + 1) or x.shape[-3] != channels or x.shape[-1] % p or x.shape[-2] % p:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"expected samples like (B, {expected}), got {tuple(x.shape)}")
        x = x if x.ndim == 5 else x[:, None]
        grid = (x.shape[1], x.shape[-2] // p, x.shape[-1] // p)
        patches = x.unflatten(-1, (-1, p)).unflatten(-3, (-1, p)).permute(0, 1, 3, 5, 4, 6, 2)
        return patches.flatten(4).flatten(2, 3), grid

    def untokens(self, tokens: Tensor, grid: Grid, video: bool) -> Tensor:
        """The inverse of `tokens`: `(B, T, F, C patch^2)` to `(B, T, C, H, W)`, or an image without T."""
        p = self.patch
        x = tokens.unflatten(2, grid[1:]).unflatten(-1, (p, p, -1)).permute(0, 1, 6, 2, 4, 3, 5)
        x = x.flatten(-2).flatten(-3, -2)
        return x if video else x[:, 0]

    def tokens_of_a_sample(self, frames: int | None = None) -> int:
        """Tokens that one sample takes in all blocks together; `frames` of a clip instead of the network's own."""
        *time, _, height, width = self.shape
        frames = frames or (time[0] if time else 1)
        return frames * (height // self.patch) * (width // self.patch) * len(self.blocks)

    def guided(self, block: int) -> bool:
        """Whether a block has a condition, and so another law without it."""
        return bool(self.blocks[block].text_dim)

    def _condition(self, cond: Tensor | None, block: int, copies: int) -> Tensor | None:
        """The condition of a block's sequences, as many to a sample as there are copies."""
        return cond.repeat_interleave(copies, 0) if cond is not None and self.guided(block) else None

    def flips(self, block: int) -> bool:
        """Whether a block reads the tokens of a frame backwards."""
        return (block % 2 == 0) == (self.order == "L2R")

    def _enter(self, x: Tensor, block: int, grid: Grid) -> tuple[Tensor, Grid, bool]:
        """Tokens `(B, T, F, C)` as sequences of a block, their grid, and whether each is one frame."""
        local = self.frame_local and block < len(self.blocks) - 1
        x = x.flip(2) if self.flips(block) else x
        return (x.flatten(0, 1), (1, *grid[1:]), True) if local else (x.flatten(1, 2), grid, False)

    def _leave(self, x: Tensor, block: int, grid: Grid, local: bool) -> Tensor:
        x = x.unflatten(0, (-1, grid[0])) if local else x.unflatten(1, (grid[0], -1))
        return x.flip(2) if self.flips(block) else x

    # ------------------------------------------------------------------ data to noise

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Flow:
        """Data to noise.

        Args:
            x: `(B, [T,] C, H, W)`; any number of frames and any size; one frame may come as an image.
            cond: Condition of the blocks that take one.
        """
        tokens, grid = self.tokens(x)
        cond = self.condition(cond, len(x))
        logdets, states = [], [tokens]
        for i in range(len(self.blocks)):
            tokens, logdet = self.through(tokens, i, grid, cond)
            logdets.append(logdet)
            states.append(tokens)
        return Flow(self.untokens(tokens, grid, x.ndim == 5), logdets, states)

    def walk(
        self, x: Tensor, cond: Tensor | None = None
    ) -> Iterator[tuple[AutoregressiveBlock, Tensor, Grid, Tensor | None]]:
        """Every block with the sequences `(B, D, C)` that it reads on the way to noise, their grid and condition.

        Args:
            x: See `forward`.
            cond: See there.
        """
        tokens, grid = self.tokens(x)
        cond = self.condition(cond, len(x))
        for i, block in enumerate(self.blocks):
            u, own, local = self._enter(tokens, i, grid)
            yield block, u, own, self._condition(cond, i, grid[0] if local else 1)
            tokens, _ = self.through(tokens, i, grid, cond)

    def through(self, tokens: Tensor, i: int, grid: Grid, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens `(B, T, F, C)` through block i: noise side, in raster order, and `-log sigma`, in the block's."""
        u, own, local = self._enter(tokens, i, grid)
        found = self.blocks[i](u, own, self._condition(cond, i, grid[0] if local else 1))
        logdet = found.logdet.unflatten(0, (-1, grid[0])) if local else found.logdet.unflatten(1, (grid[0], -1))
        return self._leave(found.z, i, grid, local), logdet

    def condition(self, cond: Tensor | None, batch: int) -> Tensor | None:
        """A condition in the form that blocks take; None is none."""
        return cond

    # ------------------------------------------------------------------ noise to data

    def prior(self, noise: Tensor) -> Tensor:
        """Unit noise with the variances of the prior, here 1."""
        return noise

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        inverse: Inverse,
        shallow: Inverse | Sequence[Inverse] | None = None,
        cond: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        known: Tensor | None = None,
        windows: Sequence[tuple[int, int, int]] | None = None,
        later: Tensor | None = None,
        dtype: torch.dtype | None = None,
        told: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Noise to data through all blocks, and what each inversion took, deep block first.

        A long clip goes through the deep block in windows, each after the last frames of the one before, whose places
        begin at 0 again; the other blocks then take frame by frame.

        Args:
            z: Noise, shape of the data with a batch in front.
            inverse: One of `flow.inverse`, for the deep block.
            shallow: The same for the others, one for all or one for each, data side first; None is as the deep one.
            cond: Condition, see `forward`; None is the unconditional flow.
            guidance: Away from the unconditional flow, where there is a condition; None does without.
            temperature: See `Decoder`.
            known: The first frames `(B, K, C, H, W)` of the data, which come back as they are; fewer than a window has.
            later: Condition of windows after the first; None is `cond`.
            windows: First frame, known frames and end of each, see `flow.rollout`; None is one for all.
            dtype: Of the caches.
            told: See `flow.inverse`.
        """
        tokens, grid = self.tokens(z)
        own, last, traces = self.condition(cond, len(z)), len(self.blocks) - 1, []
        weak = self.condition(None, len(z)) if guidance is not None else None
        guidance = guidance if cond is not None else None
        made, agreed = tokens[:, :0], agreement(self)
        if known is not None:
            made, given = self.tokens(known)
            for i in range(last):
                made, _ = self.through(made, i, given, own)
        for start, begun, end in windows or [(0, 0, grid[0])]:
            own = own if later is None or not start else self.condition(later, len(z))
            size = (end - start, *grid[1:])
            before = made[:, start : start + max(begun, made.shape[1] - start)]
            new, trace = self.backward_through(
                tokens[:, start:end], last, size, inverse, own, weak, guidance, temperature, before, dtype, told,
                agreed,
            )  # fmt: skip
            made = torch.cat([made[:, :start], new], 1)
            traces.append(trace)
        for i in range(last - 1, -1, -1):
            how = shallow[i] if isinstance(shallow, Sequence) else shallow or inverse
            made, trace = self.backward_through(
                made, i, grid, how, own, weak, guidance, temperature, None, dtype, told, agreed
            )
            traces.append(trace)
        tokens = made
        x = self.untokens(tokens, grid, z.ndim == 5)
        return x if known is None else torch.cat([known, x[:, known.shape[1] :]], 1), traces

    def backward_through(
        self,
        z: Tensor,
        i: int,
        grid: Grid,
        inverse: Inverse,
        cond: Tensor | None = None,
        weak: Tensor | None = None,
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        known: Tensor | None = None,
        dtype: torch.dtype | None = None,
        told: Callable[[int, int], None] | None = None,
        agreed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Noise-side tokens `(B, T, F, C)` of block i back through it.

        Args:
            z: Tokens in raster order.
            i: Number of the block.
            grid: Frames, rows and columns.
            inverse: One of `flow.inverse`.
            cond: Condition, where the block takes one.
            weak: The same of the unconditional half.
            guidance: None does without.
            temperature: See `Decoder`.
            known: Data-side tokens `(B, K, F, C)` of the first K frames, where they are known.
            dtype: Of the cache.
            told: See there.
            agreed: See there.
        """
        z, own, local = self._enter(z, i, grid)
        if known is not None:
            known = known.flip(2) if self.flips(i) else known
            known = known.flatten(1, 2)
        block, copies = self.blocks[i], grid[0] if local else 1
        cond, weak = self._condition(cond, i, copies), self._condition(weak, i, copies)
        guidance = guidance if self.guided(i) else None
        laws = Decoder(block, own, len(z), cond, weak, guidance, temperature, dtype)
        first, rest = block.split(z)
        if known is not None and known.shape[1] and block.sos_embed is None:
            first, known = block.split(known)
        x, trace = inverse(laws, first, rest, own[1] * own[2], known, told, agreed)
        x = x if block.sos_embed is not None else torch.cat([first, x], 1)
        return self._leave(x, i, grid, local), trace


def agreement(net: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Makes of a bool tensor whether it is true on all ranks that share the weights of `net`; None where none do."""
    mesh = next((p.device_mesh for p in net.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return None

    def agreed(done: Tensor) -> Tensor:
        least = done.to(torch.int32)
        dist.all_reduce(least, dist.ReduceOp.MIN, mesh.get_group())
        return least > 0

    return agreed


def check_shape(shape: Sequence[int], patch: int) -> tuple[int, ...]:
    """The shape of a sample as a tuple.

    Raises:
        ValueError: another number of axes than 3 or 4, or sides that are no multiples of the patch.
    """
    shape = tuple(shape)
    if patch < 1:
        raise ValueError(f"patch {patch}: expected a number of pixels, at least 1")
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise ValueError(f"shape {shape}: expected (channels, height, width) or (frames, channels, height, width)")
    if shape[-1] % patch or shape[-2] % patch:
        raise ValueError(f"height and width must be multiples of {patch} (the patch), got {shape[-2]}x{shape[-1]}")
    return shape
