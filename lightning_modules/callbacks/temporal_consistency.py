"""Do the frames of a clip belong together? Neighbours compared, beside the same numbers of real clips."""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from penstock.lightning_modules.callbacks.clip_features import Frames, clips
from penstock.lightning_modules.callbacks.features import FeatureExtractor, Pixels
from penstock.lightning_modules.callbacks.generation import Generated
from penstock.lightning_modules.callbacks.ranks import sum_over_ranks
from penstock.lightning_modules.callbacks.reference import Split, data_of
from penstock.lightning_modules.errors import UserError


class TemporalConsistency:
    """A metric of `GenerationMetrics`: how alike neighbouring frames are.

    Logs `frame_similarity_<features>/<nfe>`, the mean cosine of the features of neighbours, and `frame_change/<nfe>`,
    the mean absolute difference of their pixels in [-1, 1], which sees flicker and motion alike: frames are not
    brought into line by the motion between them. As `/real` stands the same for real clips, the value to meet: a frozen
    clip has similarity 1 and change 0, which is no better.
    """

    def __init__(self, features: FeatureExtractor | None = None, split: Split = "test"):
        """Names the features.

        Args:
            features: of images; None = the pixels.
            split: of the real clips.
        """
        self.features, self.split = Frames(features or Pixels()), split
        self._real: dict[str, float] | None = None

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the feature network.

        Raises:
            UserError: data that are no videos of two frames or more.
        """
        shape = tuple(trainer.datamodule.shape)
        if len(shape) != 4 or shape[0] < 2:
            raise UserError(f"frame_change: data of shape {shape}, expected videos of 2 frames or more")
        self.features.prepare(torch.device("cpu"))

    def reset(self, device: torch.device) -> None:
        """Forgets the samples."""
        self.features.prepare(device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, samples: Generated) -> None:
        """Adds a chunk."""
        self._sums += _sums(samples.data, samples.features(self.features))

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """The means over all pairs of neighbours."""
        return self._means(self._sums)

    def constants(self, trainer: pl.Trainer) -> dict[str, float]:
        """`frame_similarity_<features>/real` and `frame_change/real`, measured once."""
        if self._real is None:
            total = torch.zeros_like(self._sums)
            for batch in trainer.datamodule.reference_dataloader(self.split):
                data = data_of(trainer.strategy.batch_to_device(batch))
                if len(data):
                    total += _sums(data, self.features(data))
            self._real = self._means(total)
        return {f"{name}/real": value for name, value in self._real.items()}

    def _means(self, sums: Tensor) -> dict[str, float]:
        count, similarity, change = sum_over_ranks(sums).tolist()
        return {f"frame_similarity_{self.features.features.name}": similarity / count, "frame_change": change / count}


def _sums(data: Tensor, features: Tensor) -> Tensor:
    """Number of pairs, and sums over them of cosines and changes, float64 `(3,)`."""
    change = clips(data, least=2).diff(dim=1).abs().flatten(2).double().mean(2)
    rows = features.unflatten(0, data.shape[:2]).double()
    similarity = cosine_similarity(rows[:, 1:], rows[:, :-1], dim=2)
    return torch.stack([change.new_tensor(change.numel()), similarity.sum(), change.sum()])
