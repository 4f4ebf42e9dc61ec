"""Which proposals of an image a two-stage detector is trained on, whatever rank the image is on."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from penstock.lightning_modules.callbacks.ranks import rank_and_world, shared_count, sum_over_ranks


class SharedSampler(BalancedPositiveNegativeSampler):
    """Draws positives and negatives in torchvision's numbers.

    The first rank draws a seed from torch's global generator; an image's draws belong to it and to the image's place in
    the batch of all ranks, of which each has as many.

    Attributes:
        kept: float32 `(2,)`, how many were drawn last on this rank, and how many of them are positive.
    """

    kept: Tensor

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks uint8 `(n,)` of the positives and of the negatives of each image.

        Args:
            matched_idxs: Of each image `(n,)`: above 0 for positives, 0 for negatives, below 0 for neither.
        """
        device, (rank, _) = matched_idxs[0].device, rank_and_world()
        seed = int(sum_over_ranks(torch.randint(2**31, (), device=device) * (rank == 0)))
        positives, negatives = [], []
        for place, one in enumerate(matched_idxs, rank * len(matched_idxs)):
            generator = torch.Generator(device).manual_seed(seed + place)
            wanted = int(self.batch_size_per_image * self.positive_fraction)
            positives.append(_some(one >= 1, wanted, generator))
            negatives.append(_some(one == 0, self.batch_size_per_image - int(positives[-1].sum()), generator))
        counts = [torch.cat(masks).sum() for masks in (positives, negatives)]
        self.kept = torch.stack([counts[0] + counts[1], counts[0]]).float()
        return positives, negatives


def shares_of_ranks(samplers: Sequence[SharedSampler]) -> Tensor:
    """`(s, 2)`: by what means over `kept` are multiplied, for their mean over the ranks to be that of one rank."""
    kept = torch.stack([sampler.kept for sampler in samplers])
    return kept / shared_count(kept)


def _some(candidates: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """uint8 `(n,)`: up to `number` of the candidates, a bool mask `(n,)`."""
    places = candidates.nonzero()[:, 0]
    chosen = places[torch.randperm(len(places), generator=generator, device=places.device)[:number]]
    return torch.zeros_like(candidates, dtype=torch.uint8).index_fill(0, chosen, 1)
