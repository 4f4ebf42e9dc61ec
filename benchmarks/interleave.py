"""A rival training loop that takes turns with Lightning inside one `penstock fit`, block by block."""

import json
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from penstock.benchmarks.launch import fitted
from penstock.benchmarks.timing import clocks, ratio, since
from penstock.lightning_modules.callbacks.ema import EMA

Step = Callable[[], Tensor]


class Rival:
    """What a loop without Lightning starts from: a copy of the net, the same optimiser and schedule, all the data.

    Args:
        trainer: of the run to compare with; names clipping and data.
        module: a `RectifiedFlow`; names net, optimiser, schedule and share of dropped conditions.
    """

    def __init__(self, trainer: Trainer, module: LightningModule):
        self.net = deepcopy(module.net)
        self.optimizer = module.optimizer(self.net.parameters())
        self.scheduler = module.scheduler(self.optimizer)
        self.images, self.labels = _training_set(trainer.datamodule, module.device)
        self.batch_size = trainer.datamodule.batch_size
        self.clip = trainer.gradient_clip_val
        self.decay = next(c.decay for c in trainer.callbacks if isinstance(c, EMA))
        self.condition_dropout, self.eps = module.condition_dropout, module.eps

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless shuffled batches of images and labels, whole ones only."""
        while True:
            order = torch.randperm(len(self.images), device=self.images.device)
            for rows in order.split(self.batch_size)[: len(order) // self.batch_size]:
                yield self.images[rows], self.labels[rows]


def _training_set(data: LightningDataModule, device: torch.device) -> tuple[Tensor, Tensor]:
    parts = [data.finished(batch) for batch in data.reference_dataloader("train")]
    return tuple(torch.cat([part[key] for part in parts]).to(device) for key in ("image", "label"))


def plain(rival: Rival) -> Step:
    """Rectified flow as one would write it in plain PyTorch: a function that makes one step and returns the loss."""
    params = list(rival.net.parameters())
    average = [p.detach().clone() for p in params]
    batches = rival.batches()

    def step() -> Tensor:
        x1, label = next(batches)
        x0 = torch.randn_like(x1)
        t = rival.eps + (1 - rival.eps) * torch.rand(len(x1), device=x1.device)
        label = rival.net.drop_condition(label, torch.rand(len(x1), device=x1.device) < rival.condition_dropout)
        s = t[:, None, None, None]
        loss = (rival.net(s * x1 + (1 - s) * x0, t, label) - (x1 - x0)).square().mean()
        rival.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, rival.clip)
        rival.optimizer.step()
        rival.scheduler.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - rival.decay)
        return loss.detach()

    return step


def torchcfm(rival: Rival, exact_ot: bool) -> Step:
    """A step as torchcfm's image examples make it, with the same net: its matcher, plain Adam, EMA key by key."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

    matcher = ExactOptimalTransportConditionalFlowMatcher(0.0) if exact_ot else ConditionalFlowMatcher(0.0)
    optimizer = torch.optim.Adam(rival.net.parameters(), lr=rival.optimizer.defaults["lr"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 5000) / 5000)
    average = deepcopy(rival.net).state_dict()
    batches = rival.batches()

    def step() -> Tensor:
        optimizer.zero_grad()
        x1, label = next(batches)
        x0 = torch.randn_like(x1)
        if exact_ot:
            t, x_t, u_t, _, label = matcher.guided_sample_location_and_conditional_flow(x0, x1, y1=label)
        else:
            t, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
        loss = torch.mean((rival.net(x_t, t, label) - u_t) ** 2)
        loss.backward()
        nn.utils.clip_grad_norm_(rival.net.parameters(), rival.clip)
        optimizer.step()
        scheduler.step()
        for key, value in rival.net.state_dict().items():
            average[key].copy_(average[key] * rival.decay + value * (1 - rival.decay))
        return loss.detach()

    return step


RIVALS: dict[str, Callable[[Rival], Step]] = {
    "plain": plain,
    "torchcfm": partial(torchcfm, exact_ot=False),
    "torchcfm_ot": partial(torchcfm, exact_ot=True),
}


class Interleave(Callback):
    """Stops Lightning every `block` steps, lets the rival make as many, and writes both times into the run folder.

    Everything that Lightning does between two stops counts as its time: loader, hooks, callbacks, ends of epochs,
    checkpoints. `interleave.json` holds (wall seconds, CPU seconds) of each block, the first of each left out.

    Args:
        rival: who takes turns with Lightning.
        block: steps of a turn.
    """

    def __init__(self, rival: Literal["plain", "torchcfm", "torchcfm_ot"] = "plain", block: int = 50):
        self.rival, self.block = rival, block
        self.ours: list[tuple[float, float]] = []
        self.theirs: list[tuple[float, float]] = []
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = RIVALS[self.rival](Rival(trainer, pl_module))
        self._forward = trainer.precision_plugin.forward_context

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._steps % self.block == 0:
            now = clocks(pl_module.device)
            if self._steps:
                self.ours.append(since(self._mark, now))
            self._turn(trainer.log_every_n_steps)
            self._mark = clocks(pl_module.device)
            self.theirs.append(since(now, self._mark))
        self._steps += 1

    def _turn(self, log_every: int) -> None:
        for n in range(self.block):
            with self._forward():
                loss = self._step()
            if n % log_every == 0:
                float(loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record = {"block": self.block, "ours": self.ours[1:], "theirs": self.theirs[1:]}
        Path(trainer.default_root_dir, "interleave.json").write_text(json.dumps(record))


class Contest(NamedTuple):
    """Steps a second of Lightning and of its rival, and how much longer Lightning takes.

    `overhead` is the median over the turns, each against the mean of the rival's turns before and after it;
    `overhead_with_epoch_ends` compares the sums, so that rare work such as checkpoints counts too. `cpu_overhead` and
    `cpu_overhead_with_epoch_ends` are the same in CPU seconds of the process, which other work on the machine does not
    inflate.
    """

    steps_per_second: float
    rival_steps_per_second: float
    overhead: float
    overhead_with_epoch_ends: float
    cpu_overhead: float
    cpu_overhead_with_epoch_ends: float
    turns: int


def contest(rival: str, words: list[str], turns: int, block: int, threads: int | None) -> Contest:
    """Runs `penstock fit <words>` with a rival for `turns` counted turns of `block` steps each."""
    own = [
        f"callbacks.interleave.class_path={Interleave.__module__}.Interleave",
        f"callbacks.interleave.rival={rival}",
        f"callbacks.interleave.block={block}",
        "trainer.max_epochs=-1",
        f"trainer.max_steps={(turns + 1) * block + 1}",
    ]
    with fitted([*words, *own], threads) as run:
        record = json.loads((run / "interleave.json").read_text())
    (wall, cpu), (their_wall, their_cpu) = zip(*record["ours"]), zip(*record["theirs"])
    return Contest(
        block / median(wall),
        block / median(their_wall),
        *_overheads(wall, their_wall),
        *_overheads(cpu, their_cpu),
        len(wall),
    )


def _overheads(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    around = [(a + b) / 2 for a, b in pairwise(theirs)]
    return ratio(ours, around) - 1, sum(ours) / sum(around) - 1
