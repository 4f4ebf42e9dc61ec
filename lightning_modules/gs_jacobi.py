"""Which blocks of a flow are hard to invert, what each is best started from, and inverses that follow from that.

GS-Jacobi (arXiv 2505.12849): a small batch of data goes through the flow once. The Convergence Ranking Metric says
which blocks take many sweeps; those are swept segment by segment, the others as a whole. The Initial Guessing Metric
says what the sweeps of each block start from.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml
from torch import Tensor

from penstock.kernels.affine import moments
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.inverse import Jacobi, Start

if TYPE_CHECKING:
    from penstock.lightning_modules.nets.autoregressive import AutoregressiveBlock, Grid
    from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow


class Metrics(NamedTuple):
    """Of one block.

    Attributes:
        crm: Convergence Ranking Metric `|W_s| |diag(1 / sigma) u| + |W_mu|`, where W are the halves of the last layer.
        igm: Initial Guessing Metric `|u' - u|` of each start, where `u'` is what one sweep from it makes.
        tokens: Of a sequence.
    """

    crm: float
    igm: dict[Start, float]
    tokens: int


@torch.no_grad()
def measure(net: "AutoregressiveFlow", x: Tensor, cond: Tensor | None = None) -> list[Metrics]:
    """Metrics of all blocks, data side first.

    Args:
        net: The flow.
        x: A batch of data with the noise of training `(B, [T,] C, H, W)`.
        cond: Condition, see `AutoregressiveFlow.forward`.
    """
    return [block_metrics(*step) for step in net.walk(x, cond)]


@torch.no_grad()
def block_metrics(block: "AutoregressiveBlock", u: Tensor, grid: "Grid", cond: Tensor | None = None) -> Metrics:
    """Metrics of one block. Norms are spectral, of means over the batch, which are matrices `(D, C)`.

    Sequences of several frames have a third start, `frame`: the frame before, as it should be.

    Args:
        block: The block.
        u: Its data side `(B, D, C)`.
        grid: Frames, rows and columns.
        cond: Text, where the block takes some.
    """
    found = block(u, grid, cond)
    first, rest = block.split(u)
    z = block.split(found.z)[1]
    laws = moments(found.raw, block.scale, block.soft_clip)
    scaled = rest / laws[1]
    if block.sos_embed is None:
        scaled = torch.cat([first, scaled], 1)
    *scale, mean = block.proj_out.weight.split(block.channels)
    crm = sum(_norm(scaled.mean(0)) * _norm(half) for half in scale) + _norm(mean)
    frame = grid[1] * grid[2]
    guesses: dict[Start, Tensor] = {"noise": z, "zeros": torch.zeros_like(z)}
    if grid[0] > 1:
        whole = torch.cat([found.z[:, :frame], u[:, :-frame]], 1)
        guesses["frame"] = block.split(whole)[1]
    igm = {}
    for start, guess in guesses.items():
        if block.sos_embed is None:
            guess = torch.cat([first, guess], 1)
        mu, sigma = moments(block(guess, grid, cond).raw, block.scale, block.soft_clip)
        igm[start] = _norm((mu + sigma * z - rest).mean(0))
    return Metrics(crm, igm, rest.shape[1])


def _norm(matrix: Tensor) -> float:
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return float(torch.linalg.matrix_norm(wide, 2)) if bool(wide.isfinite().all()) else math.inf


def choose(
    metrics: Sequence[Metrics],
    segments: int = 8,
    tolerance: float = 1e-3,
    tough: int = 32,
    other: int = 10,
    clamp: float = 0.0,
) -> list[Jacobi]:
    """Inverses of all blocks, data side first.

    A block whose CRM is more than twice the mean of the others' is swept in segments: on the four flows of the paper
    these are the blocks that its authors segment, but for one. The start is the one of the least IGM.

    Args:
        metrics: Of the blocks, from `measure`.
        segments: Of a block that takes many sweeps.
        tolerance: See `Jacobi`.
        tough: The most sweeps of a segment.
        other: The most sweeps of the other blocks.
        clamp: See `Jacobi`; 3 in the paper.
    """
    total, found = sum(block.crm for block in metrics), []
    for block in metrics:
        hard = block.crm * (len(metrics) - 1) > 2 * (total - block.crm)
        chunk = math.ceil(block.tokens / segments) if hard else block.tokens
        start = min(block.igm, key=block.igm.__getitem__)
        found.append(Jacobi(chunk, None, tolerance, tough if hard else other, start, clamp))
    return found


def config(inverses: Sequence[Jacobi]) -> dict[str, Any]:
    """`inverse` and `shallow` of a model, as a configuration has them, from the inverses of all blocks."""
    *shallow, deep = ({"class_path": f"{Jacobi.__module__}.Jacobi", "init_args": asdict(one)} for one in inverses)
    return {"inverse": deep, "shallow": shallow}


def read(path: Path) -> dict[str, Any]:
    """`inverse` and `shallow` of a model from a YAML file of `config`.

    Raises:
        UserError: no such file, or other keys.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"inverse={path}: expected a YAML file with the keys inverse and shallow") from None
    if not isinstance(found, dict) or not found or found.keys() - {"inverse", "shallow"}:
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else "no keys"
        raise UserError(f"inverse={path}: it has {keys or 'no keys'}; expected inverse and shallow")
    return found
