"""STARFlow and STARFlow-V on data whose laws are known: nats and squared errors beside the closed forms.

`python -m penstock.benchmarks.starflow_toys --threads 1` trains (a) stacks of one to four blocks on a mixture in the
plane, (b) a flow of Gaussian data, (c) flows and denoisers of clips that are an AR(1) process, and writes the table.
"""

import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from penstock.benchmarks.known_laws import CONSTANT, Clips, gaussian, mixture, mixture_nll
from penstock.benchmarks.report import parser, write
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser, Sight
from penstock.lightning_modules.nets.starflow import STARFlow as Net
from penstock.lightning_modules.schedules import WarmupCosine
from penstock.lightning_modules.starflow import STARFlow
from penstock.lightning_modules.starflow_v import STARFlowV

Draw = Callable[[int, torch.Generator], Tensor]
SMALL = {"dim": 32, "head_dim": 32}
MIXTURE = {1: 4.247, 2: 2.117, 3: 1.970, 4: 1.960}
STEPS = {"1 block": 500, "2 blocks": 3000, "3 blocks": 4000, "4 blocks": 4000}
STEPS |= {"gaussian": 600, "clips": 2000, "denoiser": 800}
PARTS = ("mixture", "gaussian", "clips")
DEPTH = 3


class Fresh(IterableDataset):
    """Batches of new samples without end, each sample with a number of its own.

    Args:
        draw: Makes that many samples.
        key: Entry of the batch that holds them.
        batch: Samples of a batch.
        seed: Of the samples.
    """

    def __init__(self, draw: Draw, key: str, batch: int, seed: int):
        self.draw, self.key, self.batch, self.seed = draw, key, batch, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator, number = torch.Generator().manual_seed(self.seed), torch.arange(self.batch)
        while True:
            yield {self.key: self.draw(self.batch, generator), "index": number}
            number = number + self.batch


def train(module: LightningModule, draw: Draw, key: str, steps: int, batch: int, seed: int) -> None:
    """Trains a module on new samples with Lightning on the CPU."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Fresh(draw, key, batch, seed), batch_size=None))
    module.eval()


def adam(lr: float) -> Callable[..., torch.optim.Adam]:
    """With the paper's averages."""
    return partial(torch.optim.Adam, lr=lr, betas=(0.9, 0.95))


def schedule(steps: int) -> Callable[..., WarmupCosine]:
    """Of a run of that many steps."""
    return partial(WarmupCosine, total=steps, warmup=min(50, steps // 2))


# ---------------------------------------------------------------------- experiments


def row(part: str, what: str, expected: float, found: Tensor, best: Tensor) -> dict[str, Any]:
    """A row of the table: a mean over samples, its standard error, and how much the best is below it on the same."""
    return {
        "part": part,
        "what": what,
        "expected": f"{expected:.4f}",
        "found": f"{float(found.mean()):.4f}",
        "standard error": f"{float(found.std()) / len(found) ** 0.5:.4f}",
        "above the exact law on the same samples": f"{float((found - best).mean()):.4f}",
    }


def stack(blocks: int, steps: int) -> STARFlow:
    """Blocks of two scalar tokens in alternating order.

    The output weights start at random: at zero no block's law depends on a token, and as the coordinates of the mixture
    are independent the gradient of all blocks is zero there.
    """
    net = Net((1, 1, 2), depths=(1,) * blocks, **SMALL)
    for block in net.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    return STARFlow(net, adam(3e-3), schedule(steps), noise=0.0, penalty=0.0, denoise=False)


@torch.no_grad()
def nats(module: STARFlow | STARFlowV, x: Tensor) -> Tensor:
    """Nats a sample `(n,)`."""
    return -torch.cat([module.log_prob(part) for part in x.split(2000)])


def named(blocks: int) -> str:
    """Their number in words."""
    return f"{blocks} {'block' if blocks == 1 else 'blocks'}"


def mixture_row(blocks: int, steps: int, seed: int, n: int) -> dict[str, Any]:
    """Part (a): a stack of blocks on the mixture."""
    seed_everything(seed, verbose=False)
    flow = stack(blocks, steps)
    train(flow, mixture, "image", steps, 512, seed + 1)
    x = mixture(n, torch.Generator().manual_seed(seed + 2))
    return row("mixture", f"nats, {named(blocks)}", MIXTURE[blocks], nats(flow, x), mixture_nll(x))


def gaussian_rows(steps: int, seed: int, n: int, sigma: float = 0.3) -> list[dict[str, Any]]:
    """Part (b): likelihood, and the noise taken away along its gradient."""
    seed_everything(seed, verbose=False)
    net = Net((1, 2, 2), depths=(1, 1), **SMALL)
    flow = STARFlow(net, adam(2e-3), schedule(steps), noise=sigma, penalty=0.0)
    train(flow, gaussian, "image", steps, 256, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    clean = gaussian(n, generator)
    x, variance = clean + sigma * torch.randn(clean.shape, generator=generator), 1 + sigma**2
    best = (0.5 * (x.square() / variance + math.log(variance)) + CONSTANT).flatten(1).mean(1)
    found = (flow.tweedie(x) - clean).square().flatten(1).mean(1)
    raw = (x / variance - clean).square().flatten(1).mean(1)
    return [
        row("gaussian", "nats a dimension", 0.5 * math.log(2 * math.pi * math.e * variance), nats(flow, x) / 4, best),
        row("gaussian", "squared error, gradient", sigma**2 / variance, found, raw),
    ]


def clip_flow(clips: Clips, sight: Sight, ahead: int, steps: int, net: Net | None = None) -> STARFlowV:
    """A flow of clips and a denoiser; with `net` the flow is that one and stays as it is."""
    denoiser = FlowDenoiser(1, 32, DEPTH, 32, side=1, window=10, sight=sight, ahead=ahead)
    if net is None:
        net = Net((clips.frames, 1, 1, 1), depths=(1, 2), **SMALL)
    else:
        net.requires_grad_(False)
    return STARFlowV(
        net,
        adam(2e-3),
        denoiser,
        schedule(steps),
        noise=clips.sigma,
        first_frame_dropout=0.0,
        denoiser_lr=2e-3,
        skip_after=None,
    )


def clip_rows(sigma: float, steps: int, denoiser_steps: int, seed: int, n: int) -> list[dict[str, Any]]:
    """Part (c): likelihood of noisy clips, their noise taken away along its gradient and by denoisers."""
    clips, name, rows, net = Clips(sigma), f"clips, sigma {sigma}", [], None
    middle, end, generator = 12, clips.frames - 1, torch.Generator().manual_seed(seed + 2)
    clean = clips.draw(n, generator)
    x = clean + sigma * torch.randn(clean.shape, generator=generator)

    def errors(what: str, estimate: Tensor, frame: int, last: int) -> None:
        target = clean[:, frame].flatten()
        best = x.flatten(1) @ clips.estimator(frame, last).float()
        found = (estimate[:, frame].flatten() - target).square()
        rows.append(row(name, what, clips.error(frame, last), found, (best - target).square()))

    kinds: list[tuple[Sight, int, int]] = [("first_layer", 1, 1), ("first_layer", 0, 0), ("every_layer", 1, DEPTH)]
    for sight, ahead, seen in kinds:
        seed_everything(seed, verbose=False)
        own = steps if net is None else denoiser_steps
        flow = clip_flow(clips, sight, ahead, own, net)
        train(flow, clips.draw, "video", own, 64, seed + 1)
        if net is None:
            net = flow.net
            rows.append(row(name, "nats a frame", clips.entropy(), nats(flow, x) / clips.frames, clips.nll(x)))
            step = torch.cat([flow.tweedie(part) for part in x.split(2000)])
            errors(f"squared error of frame {middle}, gradient", step, middle, end)
        with torch.no_grad():
            clean_x = torch.cat([flow.clean(part) for part in x.split(2000)])
        kind = f"denoiser, {sight}, ahead {ahead}"
        errors(f"squared error of frame {middle}, {kind}", clean_x, middle, middle + seen)
        if sight == "first_layer" and ahead:
            errors(f"squared error of frame 0, {kind}", clean_x, 0, 1)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures and writes `starflow_toys.json`, `starflow_toys.md`."""
    options = parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--share", type=float, default=1.0, help="factor on all numbers of training steps")
    options.add_argument("--n", type=int, default=50_000, help="samples that are measured")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    steps = {name: max(2, round(given.share * value)) for name, value in STEPS.items()}
    rows, seconds = [], {}
    for part in given.parts:
        start = time.perf_counter()
        if part == "mixture":
            rows += [mixture_row(blocks, steps[named(blocks)], given.seed, given.n) for blocks in MIXTURE]
        elif part == "gaussian":
            rows += gaussian_rows(steps["gaussian"], given.seed, given.n)
        else:
            for sigma in (0.5, 0.3):
                rows += clip_rows(sigma, steps["clips"], steps["denoiser"], given.seed, given.n)
        seconds[part] = round(time.perf_counter() - start, 1)
    title = "STARFlow and STARFlow-V on data whose laws are known"
    write("starflow_toys", {"steps": steps, "seconds": seconds}, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
