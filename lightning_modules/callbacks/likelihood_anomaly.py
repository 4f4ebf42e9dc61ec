"""Anomalies by likelihood: does a density model tell what is not like its data?"""

from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from penstock.lightning_modules.callbacks.anomalies import ANOMALIES, Anomaly, spoiled
from penstock.lightning_modules.callbacks.density import (
    bits_per_dim,
    check_density,
    first_batches,
    log_prob_of_parts,
)
from penstock.lightning_modules.callbacks.generation import EvaluationCallback
from penstock.lightning_modules.callbacks.ranks import broadcast, gather_rows
from penstock.lightning_modules.callbacks.reference import Split, data_of
from penstock.lightning_modules.errors import UserError, did_you_mean

Rows = list[tuple[Tensor, ...]]


class LikelihoodAnomaly(EvaluationCallback):
    """Scores samples by `-log2 p(x) / D`, and says how well that tells anomalies from held-out data.

    Logs `anomaly_auroc/<anomaly>`, the area under the ROC curve of held-out samples against as many anomalies (0.5 is
    chance): held-out clips spoiled in time (`anomalies`) under the captions or classes of the whole ones, or samples of
    `other` data. Where the module tells the frames of clips apart, each given those before it,
    `anomaly_worst_frame_auroc/<anomaly>` compares the least likely frames of the clips, and
    `anomaly_frame_auroc/replaced` the frames of the clips with one replaced, but the first: this one against the rest.

    Args:
        anomalies: `shuffled`, `reversed`, `frozen`, `replaced`, see `spoiled`; None is all of them for clips, and none
            for images.
        other: Data that are anomalies, `anomaly_auroc/other`.
        n: Samples of each kind, the first ones of the split.
        split: Split they come from.
        every_n_validations: 0 = only after training, in `validate` and `test`.

    Raises:
        UserError: a module without `log_prob`, an unknown anomaly, spoiled images, other data of another shape, or
            nothing to tell.
    """

    def __init__(
        self,
        anomalies: list[Anomaly] | None = None,
        other: pl.LightningDataModule | None = None,
        n: int = 200,
        split: Split = "test",
        every_n_validations: int = 0,
    ):
        super().__init__(every_n_validations)
        if n < 2:
            raise UserError(f"n: {n} samples given, expected at least 2")
        for anomaly in anomalies or []:
            if anomaly not in ANOMALIES:
                raise UserError(f"anomalies: no '{anomaly}'{did_you_mean(anomaly, ANOMALIES)}; {', '.join(ANOMALIES)}")
        self.anomalies, self.other, self.n, self.split = anomalies, other, n, split

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_density(trainer, pl_module, "anomaly_auroc")
        shape = tuple(trainer.datamodule.shape)
        video = len(shape) == 4 and shape[0] > 1
        if self.anomalies and not video:
            raise UserError(f"anomalies: {', '.join(self.anomalies)} of data of shape {shape}; expected videos")
        self.kinds = list(ANOMALIES if self.anomalies is None and video else self.anomalies or [])
        if not self.kinds and self.other is None:
            raise UserError(
                "anomaly_auroc: no anomalies to tell from the data; expected anomalies (of videos) or other"
            )
        if self.other is not None:
            self.other.trainer = trainer
            self.other.prepare_data()
            self.other.setup(stage)
            if (tuple(self.other.shape), bool(self.other.levels)) != (shape, True):
                raise UserError(f"other: data of shape {tuple(self.other.shape)}, expected {shape} with grey levels")

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All ranks score their shares; rank 0 compares."""
        data, other = trainer.datamodule, self.other
        found: dict[str, Rows] = {kind: [] for kind in ("held out", *self.kinds, "other")}
        for batch in first_batches(trainer, data, self.split, self.n):
            found["held out"].append(_scored(pl_module, batch, data.levels))
            for kind in self.kinds:
                clips, strange = spoiled(batch["video"], batch["index"], kind)
                if len(clips):
                    found[kind].append(_scored(pl_module, {**batch, "video": clips}, data.levels, strange))
        for batch in first_batches(trainer, other, self.split, self.n) if other is not None else ():
            found["other"].append(_scored(pl_module, batch, other.levels))
        pl_module.log_dict(broadcast(_compared(found)), batch_size=1, sync_dist=True)


def _scored(
    pl_module: pl.LightningModule, batch: dict[str, Any], levels: int, strange: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers, bits a dimension `(b, T)` or `(b, 1)`, and which frames are strange."""
    log_prob = log_prob_of_parts(pl_module, batch, levels)
    size = data_of(batch)[0].numel() // log_prob.shape[1]
    return batch["index"], bits_per_dim(log_prob, size, levels), strange


def _compared(found: dict[str, Rows]) -> dict[str, float]:
    """Areas under the curves, on rank 0; all ranks must call it."""
    rows = {kind: gather_rows(*_columns(parts)) for kind, parts in found.items()}
    values: dict[str, float] = {}
    for kind, gathered in rows.items():
        if gathered is None or kind == "held out" or not len(gathered[0]):
            continue
        _, bits, strange = gathered
        whole = rows["held out"][1]
        values[f"anomaly_auroc/{kind}"] = _area(whole.mean(1), bits.mean(1))
        if whole.shape[1] > 1:
            values[f"anomaly_worst_frame_auroc/{kind}"] = _area(whole.amax(1), bits.amax(1))
        if kind == "replaced" and bits.shape == strange.shape:
            later, odd = bits[:, 1:], strange[:, 1:]
            values["anomaly_frame_auroc/replaced"] = _area(later[~odd], later[odd])
    return values


def _columns(parts: Rows) -> tuple[Tensor | None, ...]:
    if not parts:
        return torch.empty(0, dtype=torch.int64), None, None
    return tuple(None if column[0] is None else torch.cat(column) for column in zip(*parts))


def _area(normal: Tensor, anomalous: Tensor) -> float:
    truth = [0] * len(normal) + [1] * len(anomalous)
    return float(roc_auc_score(truth, torch.cat([normal, anomalous]).numpy()))
