"""Feature maps of images that do not change, computed once."""

from collections.abc import Callable

import torch
from torch import Tensor


class FeatureCache:
    """Keeps the feature maps of samples by their numbers, on the device they were made on, in the precision they have.

    Maps are added as samples come: memory is that of the samples seen, `bytes`.
    """

    def __init__(self) -> None:
        self.row_of: dict[int, int] = {}
        self.kept: list[Tensor] = []
        self.rows = torch.empty(0, dtype=torch.int64)

    @property
    def bytes(self) -> int:
        """Memory of the maps."""
        return sum(kept.numel() * kept.element_size() for kept in self.kept)

    def __call__(
        self, index: Tensor, image: Tensor, net: Callable[[Tensor], list[Tensor]], known: bool = False
    ) -> list[Tensor]:
        """Feature maps of samples, by `net` where they are not kept.

        Args:
            index: Numbers `(B,)`.
            image: Images `(B, C, H, W)`.
            net: Images to maps `(B, C_l, H_l, W_l)`.
            known: Whether all are kept, as the caller knows; otherwise the device is asked for the numbers.
        """
        if not known:
            numbers = index.tolist()
            new = [k for k, number in enumerate(numbers) if number not in self.row_of]
            if new:
                maps = net(image)
                self._keep([numbers[k] for k in new], [m[new] for m in maps])
                return maps
        return [kept.index_select(0, self.rows[index]) for kept in self.kept]

    def _keep(self, numbers: list[int], maps: list[Tensor]) -> None:
        first, last = len(self.row_of), len(self.row_of) + len(numbers)
        if not self.kept or last > len(self.kept[0]):
            self.kept = [_grown(old, 2 * last, m) for old, m in zip(self.kept or [m[:0] for m in maps], maps)]
        for kept, m in zip(self.kept, maps):
            kept[first:last] = m
        if (largest := max(numbers)) >= len(self.rows):
            self.rows = _grown(self.rows.to(maps[0].device), 2 * largest + 1, self.rows)
        self.rows[torch.tensor(numbers, device=self.rows.device)] = torch.arange(first, last, device=self.rows.device)
        self.row_of |= {number: first + k for k, number in enumerate(numbers)}


def _grown(old: Tensor, size: int, like: Tensor) -> Tensor:
    more = old.new_empty(size, *like.shape[1:])
    more[: len(old)] = old
    return more
