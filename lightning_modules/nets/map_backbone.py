"""What detectors and segmenters ask of a backbone: maps of an image at several strides."""

from torch import Tensor, nn


class MapBackbone(nn.Module):
    """Images `(B, C, H, W)` in [-1, 1] to maps `(B, C_l, H_l, W_l)`, fine ones first. A subclass has `forward`.

    Attributes:
        channels: Of the maps.
        strides: Pixels of their cells.
        weights: Where its pretrained weights are.
        about: What its maps are, for messages.
    """

    channels: list[int]
    strides: list[int]
    weights: str
    about: str

    def load(self) -> None:
        """Loads pretrained weights."""
        raise NotImplementedError

    def __call__(self, image: Tensor) -> list[Tensor]:
        return super().__call__(image)
