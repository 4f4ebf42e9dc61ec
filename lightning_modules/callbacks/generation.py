"""Samples for metrics and pictures, and the callback that scores one set of samples by several metrics."""

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from penstock.lightning_modules.callbacks.features import FeatureExtractor
from penstock.lightning_modules.callbacks.ranks import broadcast, largest, rank_and_world
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.steps import CALLS, parse_steps

CHUNK = 250


@dataclass(frozen=True)
class Generated:
    """Some of a set of samples.

    Attributes:
        index: `(b,)` int64, numbers of these samples in the set.
        data: `(b, *shape)`; images and videos are clamped to [-1, 1].
        label: `(b,)` int64 class asked for, or None when the module is unconditional.
        nfe: network calls per sample.
        text: `b` prompts, or None when the module takes none.
    """

    index: Tensor
    data: Tensor
    label: Tensor | None
    nfe: int
    text: list[str] | None = None
    _features: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def features(self, extractor: FeatureExtractor) -> Tensor:
        """`(b, D)` features of these samples, computed once for all metrics that use the same ones."""
        key = json.dumps(extractor.identity(), sort_keys=True)
        if key not in self._features:
            self._features[key] = extractor(self.data)
        return self._features[key]


def balanced_labels(n: int, num_classes: int) -> Tensor | None:
    """`(n,)` int64 labels `j % num_classes`, or None for `num_classes = 0`."""
    return torch.arange(n) % num_classes if num_classes else None


def asked_for(
    trainer: pl.Trainer, pl_module: pl.LightningModule, n: int, split: Literal["train", "val", "test", "all"]
) -> tuple[Tensor | None, list[str] | None]:
    """Labels `(n,)` and prompts of a set: those of the data where the module takes text, else classes in turn."""
    if getattr(pl_module, "takes_text", False) and hasattr(trainer.datamodule, "prompts"):
        text, labels = trainer.datamodule.prompts(n, split)
        return labels, text
    return balanced_labels(n, pl_module.num_classes), None


def sources_for(
    trainer: pl.Trainer, pl_module: pl.LightningModule, split: Literal["train", "val", "test", "all"]
) -> Callable[[Tensor], Tensor] | None:
    """Clips that samples `(b,)` of a set are made of: those of the data whose prompts they have.

    None where the data have no sources, or `sample` takes none.
    """
    data, takes = trainer.datamodule, "source" in signature(pl_module.sample).parameters
    return partial(data.sources, split=split) if takes and getattr(data, "sourced", False) else None


def chunk_seed(seed: int, chunk: int) -> int:
    """A 63-bit seed that is a hash of `(seed, chunk)`."""
    return int(np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_steps(pl_module: pl.LightningModule, steps: int | str) -> None:
    """Refuses `bellman:K` for a module that can't look for its best steps.

    Raises:
        UserError: the module is no flow.
    """
    if not isinstance(parse_steps(steps), int) and not hasattr(pl_module, "grid_of"):
        raise UserError(f"steps={steps}: {type(pl_module).__name__} has no velocity to search; expected a flow")


@contextmanager
def _evaluating(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    training = [child for child in module.modules() if child.training]
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        module.eval()
        try:
            yield
        finally:
            for child in training:
                child.training = True


def generate(
    pl_module: pl.LightningModule,
    n: int,
    steps: int | str,
    seed: int,
    labels: Tensor | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
    text: list[str] | None = None,
    size: int = CHUNK,
    sources: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Generated]:
    """Draws `n` samples in fixed chunks of at most `size`, shared among the ranks.

    Chunk `i` has a generator of its own, seeded from `(seed, i)`, and belongs to rank `i % world`, so that any number
    of ranks makes the same set. Every rank runs the network equally often, as sharded models need: a rank without a
    chunk in the last round draws one that is thrown away. Each submodule's train or eval mode and the global random
    state are as before after every chunk.

    Args:
        pl_module: offers `sample(n, steps=, cond=, generator=)`, `nfe` and `device`.
        n: number of samples of the whole set, at least 1.
        steps: solver steps or a word for them (`bellman:4`), passed to `sample`.
        seed: non-negative.
        labels: `(n,)` int64 class of each sample; None for unconditional modules.
        context: makes the context of the module's forward pass (the trainer's precision).
        text: `n` prompts, which `sample` gets as `cond` instead of the labels.
        size: samples of a chunk; another size makes other samples.
        sources: makes of numbers in the set `(b,)` the clips that `sample` gets as `source`.

    Yields:
        This rank's chunks.
    """
    rank, world = rank_and_world()
    starts = range(0, n, size)
    for first in range(0, len(starts), world):
        mine = first + rank
        chunk = min(mine, len(starts) - 1)
        index = torch.arange(starts[chunk], min(starts[chunk] + size, n))
        label = None if labels is None else labels[index].to(pl_module.device)
        prompts = None if text is None else text[starts[chunk] : starts[chunk] + size]
        generator = torch.Generator(pl_module.device).manual_seed(chunk_seed(seed, chunk))
        with _evaluating(pl_module, pl_module.device), context():
            cond = label if text is None else prompts
            more = {} if sources is None else {"source": sources(index).to(pl_module.device)}
            data = pl_module.sample(len(index), steps=steps, cond=cond, generator=generator, **more)
        if mine == chunk:
            data = data.clamp(-1, 1) if data.ndim >= 4 else data
            yield Generated(index.to(data.device), data, label, int(pl_module.nfe), prompts)


class EvaluationCallback(Callback):
    """Runs `evaluate` at the end of every k-th validation of a fit, of every `validate` and of every `test`.

    The sanity check does not count. The number of validations seen is kept in the checkpoint, so that a resumed run is
    evaluated at the same points.
    """

    def __init__(self, every_n_validations: int = 1):
        """Sets how often.

        Args:
            every_n_validations: 0 = never during a fit.

        Raises:
            UserError: if negative.
        """
        if every_n_validations < 0:
            raise UserError(f"every_n_validations: {every_n_validations} given, expected 0 (never) or more")
        self.every_n_validations = every_n_validations
        self.validations = 0

    @abstractmethod
    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called on all ranks."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses an order of callbacks in which averaged weights are swapped out before they are scored.

        Raises:
            UserError: if a weight-averaging callback that swaps at `on_validation_epoch_end` stands before this one.
        """
        for other in trainer.callbacks[: trainer.callbacks.index(self)]:
            if type(other).on_validation_epoch_end is WeightAveraging.on_validation_epoch_end:
                raise UserError(
                    f"callbacks: {type(other).__name__} stands before {type(self).__name__} and would swap the "
                    f"averaged weights out before they are scored; expected {type(self).__name__} first"
                )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates when it is time."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.evaluate(trainer, pl_module)
            return
        self.validations += 1
        if self.every_n_validations and self.validations % self.every_n_validations == 0:
            self.evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Always evaluates."""
        self.evaluate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The number of validations seen."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the number of validations seen."""
        self.validations = state_dict["validations"]


class GenerationMetric(Protocol):
    """What `GenerationMetrics` asks of a metric: `reset`, any number of `update`s, one `compute`, for each set."""

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called once before anything runs; raises `UserError` if the metric cannot be had."""

    def reset(self, device: torch.device) -> None:
        """Begins a new set; networks that the metric needs go to `device`."""

    def update(self, samples: Generated) -> None:
        """Takes one of this rank's chunks."""

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """Values by name, without `/nfe`, on rank 0 (others may return an empty dict); called on all ranks."""

    def constants(self, trainer: pl.Trainer) -> dict[str, float]:
        """Values that do not depend on the samples, by full name; as `compute`, and after it."""


class GenerationMetrics(EvaluationCallback):
    """Draws class-balanced samples once for each number of steps and lets every metric score the same samples.

    Logs `<metric>/<nfe>`, nfe being the network calls per sample that the module reports, and `<metric>/bellman-<nfe>`
    where the module looked for the best steps. Where the calls depend on the weights and the noise (`calls_vary`), it
    is `<metric>/<steps>`, with `network_calls/<steps>` beside it: names stay the same from validation to validation.
    The values are the same for any number of ranks.
    """

    def __init__(
        self,
        metrics: list[GenerationMetric],
        steps: list[int | str],
        n: int = 1500,
        every_n_validations: int = 1,
        seed: int = 0,
        prompts: Literal["train", "val", "test", "all"] = "test",
        chunk: int = CHUNK,
    ):
        """Sets what is drawn and by what it is scored.

        Args:
            metrics: `FrechetDistance`, `LabelAccuracy` or any class with their methods.
            steps: numbers of solver steps, each at least 1, or `bellman:K`.
            n: samples of each set, at least 2.
            every_n_validations: 0 = only after training, in `validate` and `test`.
            seed: of the samples' noise; independent of the run's seed.
            prompts: split whose captions are the prompts, for a module that takes text and data that have it.
            chunk: samples that the network makes at once; another size makes other samples.

        Raises:
            UserError: for `n < 2`, `chunk < 1`, no steps, or steps that are neither numbers of at least 1 nor
                `bellman:K`.
        """
        super().__init__(every_n_validations)
        if n < 2:
            raise UserError(f"n: {n} samples given, expected at least 2")
        if chunk < 1:
            raise UserError(f"chunk: {chunk} given, expected at least 1")
        if not steps:
            raise UserError(f"steps: {steps} given, expected a list of numbers of at least 1")
        for number in steps:
            parse_steps(number)
        self.metrics, self.steps, self.n, self.seed, self.prompts, self.chunk = metrics, steps, n, seed, prompts, chunk

    @cached_property
    def state_key(self) -> str:
        """Differs between two of these in one run."""
        return self._generate_state_key(steps=self.steps, n=self.n, seed=self.seed)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lets each metric check that it can be had, before any training.

        Raises:
            UserError: without a DataModule, or from a metric.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            return
        if getattr(trainer, "datamodule", None) is None:
            raise UserError(f"{type(self).__name__}: the run has no DataModule, expected one to compare samples with")
        for number in self.steps:
            check_steps(pl_module, number)
        for metric in self.metrics:
            metric.check(trainer, pl_module)

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, scores, logs.

        Raises:
            UserError: if two metrics have the same name.
        """
        labels, text = asked_for(trainer, pl_module, self.n, self.prompts)
        values: dict[str, float] = {}
        for steps in self.steps:
            for metric in self.metrics:
                metric.reset(pl_module.device)
            nfe = 0
            context = trainer.precision_plugin.forward_context
            given = (labels, context, text, self.chunk, sources_for(trainer, pl_module, self.prompts))
            for samples in generate(pl_module, self.n, steps, self.seed, *given):
                nfe = max(nfe, samples.nfe)
                for metric in self.metrics:
                    metric.update(samples)
            nfe = largest(nfe)
            if getattr(pl_module, "calls_vary", False):
                values[f"{CALLS}/{steps}"], nfe = float(nfe), steps
            nfe = f"{'' if isinstance(parse_steps(steps), int) else 'bellman-'}{nfe}"
            for metric in self.metrics:
                for name, value in broadcast(metric.compute(trainer)).items():
                    if f"{name}/{nfe}" in values:
                        raise UserError(f"metrics: '{name}/{nfe}' is measured twice, expected one metric of that name")
                    values[f"{name}/{nfe}"] = value
        for metric in self.metrics:
            values |= broadcast(metric.constants(trainer))
        pl_module.log_dict(values, on_epoch=True, batch_size=1, sync_dist=True)
