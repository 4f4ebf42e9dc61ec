"""Stops every rank at the first loss that is not finite, before it reaches a checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from penstock.lightning_modules.errors import UserError

SHOWN = 16


class FiniteGuard(Callback):
    """Ends the run with one line on all ranks when the loss of any rank is NaN or infinite.

    The ranks agree by an all-reduced flag in every batch; the sample numbers are gathered only on failure. On the CPU
    the check comes before the backward pass, so the weights stay as they were after the last good step. On CUDA the
    flag is copied without waiting and read one batch later, or before a checkpoint is written, a validation begins or
    the epoch ends, so no step waits for the device and no file ever holds weights made by a bad step.

    Args:
        gradients: also check the total norm of the gradients before each optimiser step. Not for `16-mixed`, whose
            scaler meets infinite gradients in normal work.

    Raises:
        UserError: the loss or the gradient norm is not finite: step, ranks, sample numbers (`batch["index"]`), which of
            these have input that is not finite, the last good checkpoint. Or `gradients` with `16-mixed`.
    """

    def __init__(self, gradients: bool = False):
        self.gradients = gradients
        self._batch: Any = None
        self._pending: list[_Check] = []
        self._failure: UserError | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.gradients and trainer.precision == "16-mixed":
            raise UserError("FiniteGuard: gradients is true with precision '16-mixed', expected bf16-mixed or 32-true")
        self._pending, self._failure = [], None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._check(trainer, "loss", loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.gradients:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = get_total_norm(grads)
            self._check(trainer, "gradient norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._flush(trainer)

    def _check(self, trainer: Trainer, name: str, value: Tensor) -> None:
        if trainer.world_size == 1 and not self._lags(value) and bool(torch.isfinite(value).all()):
            return
        bad = (~torch.isfinite(value)).any().to(torch.uint8)
        anywhere = bad.clone()
        if trainer.world_size > 1:
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        host, event = anywhere, None
        if value.is_cuda:
            host = torch.empty_like(anywhere, device="cpu", pin_memory=True).copy_(anywhere, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        check = _Check(name, trainer.global_step, trainer.current_epoch, self._batch, value, bad, host, event)
        earlier = [c for c in self._pending if c.batch is not self._batch]
        self._pending = [c for c in self._pending if c.batch is self._batch] + [check]
        self._settle(trainer, earlier)
        if not self._lags(value):
            self._flush(trainer)

    @staticmethod
    def _lags(value: Tensor) -> bool:
        return value.is_cuda

    def _flush(self, trainer: Trainer) -> None:
        if self._failure is not None:
            raise self._failure
        checks, self._pending = self._pending, []
        self._settle(trainer, checks)

    def _settle(self, trainer: Trainer, checks: list["_Check"]) -> None:
        for check in checks:
            if check.event is not None:
                check.event.synchronize()
            if check.host:
                self._pending = []
                self._failure = UserError(_message(trainer, check), everywhere=True)
                raise self._failure


class _Check(NamedTuple):
    """One flag on its way to the host. `bad`: this rank; `host`: any rank, there once `event` is reached."""

    name: str
    step: int
    epoch: int
    batch: Any
    value: Tensor
    bad: Tensor
    host: Tensor
    event: torch.cuda.Event | None


def _message(trainer: Trainer, check: _Check) -> str:
    report = None
    if check.bad:
        batch = check.batch if isinstance(check.batch, dict) else {}
        index = batch["index"].tolist() if "index" in batch else []
        report = (float(check.value.flatten()[~torch.isfinite(check.value.flatten())][0]), index, _culprits(batch))
    reports = [report]
    if trainer.world_size > 1:
        reports = [None] * trainer.world_size
        dist.all_gather_object(reports, report)
    ranks = [(rank, *found) for rank, found in enumerate(reports) if found is not None]
    parts = [f"{value} on rank {rank}{_samples(index)}{culprits}" for rank, value, index, culprits in ranks]
    good = _last_checkpoint(trainer)
    saved = f"last good checkpoint '{good}'" if good else "no checkpoint was saved before it"
    where = f"step {check.step} of epoch {check.epoch}"
    return f"{check.name} is not finite at {where}: {'; '.join(parts)}; expected a finite number; {saved}"


def _samples(index: list[int]) -> str:
    if not index:
        return ""
    more = f" and {len(index) - SHOWN} more" if len(index) > SHOWN else ""
    return f" in the batch of samples {', '.join(map(str, index[:SHOWN]))}{more}"


def _culprits(batch: dict[str, Any]) -> str:
    """The samples whose own input is not finite, for each entry of the batch."""
    index, found = batch.get("index"), []
    for key, value in batch.items():
        if index is None or not isinstance(value, Tensor) or not value.is_floating_point() or len(value) != len(index):
            continue
        rows = index[~torch.isfinite(value.reshape(len(index), -1)).all(1)].tolist()
        if rows:
            found.append(f" ('{key}' is not finite in {len(rows)} of them, first {rows[0]})")
    return "".join(found)


def _last_checkpoint(trainer: Trainer) -> Path | None:
    names = {trainer.ckpt_path}
    for callback in trainer.checkpoint_callbacks:
        for attribute in ("last_model_path", "best_model_path", "best_k_models", "_last_checkpoint_saved"):
            found = getattr(callback, attribute, ())
            names |= {found} if isinstance(found, str) else set(found)
    files = [Path(name) for name in names if name and Path(name).exists()]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)
