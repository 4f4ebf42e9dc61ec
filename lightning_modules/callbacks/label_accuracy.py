"""Do class-conditional samples belong to the class they were asked for?"""

from typing import Literal

import lightning.pytorch as pl
import torch
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from penstock.lightning_modules.callbacks.features import FeatureExtractor, Pixels
from penstock.lightning_modules.callbacks.generation import Generated
from penstock.lightning_modules.callbacks.ranks import gather_rows
from penstock.lightning_modules.callbacks.reference import Reference, Split, reference
from penstock.lightning_modules.errors import UserError


class LabelAccuracy:
    """A metric of `GenerationMetrics`: share of samples that a classifier trained on real data puts in their class.

    Logs `label_accuracy/<nfe>` and, as `label_accuracy/real`, the classifier's own accuracy on real data that it has
    not seen. The classifier is scikit-learn's, fitted at first use to at most 10,000 samples of the training split; it
    lives in memory only.
    """

    def __init__(
        self,
        features: FeatureExtractor | None = None,
        classifier: Literal["svm", "logistic"] = "svm",
        held_out: Split = "test",
    ):
        """Names the classifier.

        Args:
            features: what it sees; None = the pixels.
            classifier: `svm` (RBF kernel; small images) or `logistic` (a linear head; features of a network).
            held_out: split on which its own accuracy is measured.
        """
        self.features, self.kind, self.held_out = features or Pixels(), classifier, held_out
        self._classifier: ClassifierMixin | None = None
        self._real = float("nan")
        self._collected = False

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the feature network and looks for classes.

        Raises:
            UserError: if the module or the data has no classes, or they differ in number.
        """
        if not pl_module.num_classes:
            raise UserError(
                "label_accuracy: the model is unconditional, expected a class-conditional one (num_classes > 0)"
            )
        if pl_module.num_classes != trainer.datamodule.num_classes:
            raise UserError(
                f"label_accuracy: the model has {pl_module.num_classes} classes, the data "
                f"{trainer.datamodule.num_classes}; expected the same number"
            )
        self.features.prepare(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Forgets the samples."""
        self.features.prepare(device)
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, samples: Generated) -> None:
        """Adds a chunk's features and labels."""
        self._rows.append((samples.index.cpu(), samples.features(self.features).cpu(), samples.label.cpu()))

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """The accuracy on rank 0."""
        self._fit(trainer)
        own = tuple(torch.cat(column) for column in zip(*self._rows)) or (torch.empty(0, dtype=torch.int64), None, None)
        rows = gather_rows(*own)
        if rows is None:
            return {}
        _, features, labels = rows
        return {"label_accuracy": float(self._classifier.score(features.numpy(), labels.numpy()))}

    def constants(self, trainer: pl.Trainer) -> dict[str, float]:
        """`label_accuracy/real`."""
        return {"label_accuracy/real": self._real}

    def _fit(self, trainer: pl.Trainer) -> None:
        if self._collected:
            return
        train: Reference | None = reference(trainer, self.features, "train")
        held_out = reference(trainer, self.features, self.held_out)
        self._collected = True
        if train is None or held_out is None:
            return
        head = SVC(C=10) if self.kind == "svm" else LogisticRegression(max_iter=1000)
        self._classifier = head if self.kind == "svm" else make_pipeline(StandardScaler(), head)
        self._classifier.fit(train.features.numpy(), train.labels.numpy())
        self._real = float(self._classifier.score(held_out.features.numpy(), held_out.labels.numpy()))
